"""The bundle: the folder that is released. Reading one, deciding whether one may be written, writing it whole."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from exporter.artifact import Artifact, InputContract, Signature
from exporter.digests import file_digest
from exporter.errors import InternalError, RequestError
from pipelines.disk import copy_file, disk_errors, exchange, remove_tree, sync_folder, write_durably
from pipelines.integrity import Difference, check_integrity, unlisted
from pipelines.locks import FileLock
from pipelines.manifest import MANIFEST, FileEntry, Manifest, VariantEntry, is_safe_name, parse_manifest, render, sealed
from pipelines.recipe import recipe_digest as digest_of_recipe

__all__ = ["Bundle", "Difference", "check_integrity", "check_out", "read_bundle", "write_bundle"]

OVERALL = "overall"
_REMEDY = "choose another --out"
_BELOW = 256
"""Bytes that the path of a file in a bundle may have, from the bundle's folder on."""
_FORMATS = {".onnx": "onnx", ".pt2": "aoti"}


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk: its folder and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def variants(self) -> dict[str, VariantEntry]:
        """All variants by id, those that failed or were skipped too."""
        return {variant.id: variant for variant in self.manifest.variants}

    @property
    def points(self) -> list[str]:
        """The operating points that a variant was selected for."""
        return [point for point in self.manifest.selected if point != OVERALL]

    @property
    def signature(self) -> Signature:
        return self.manifest.input_contract.signature

    @property
    def contract(self) -> InputContract:
        return self.manifest.input_contract.contract

    def selected(self, point: str = OVERALL) -> VariantEntry | None:
        """The variant selected for an operating point, or overall; `None` where none passed.

        Raises:
            RequestError: The bundle knows no such point.
        """
        if point not in self.manifest.selected:
            known = ", ".join(self.manifest.selected)
            raise RequestError("the bundle has no such operating point", point, f"It has: {known}")
        chosen = self.manifest.selected[point]
        return None if chosen is None else self.variants[chosen]

    def variant(self, name: str) -> VariantEntry:
        """The variant of that id.

        Raises:
            RequestError: There is none.
        """
        if name not in self.variants:
            raise RequestError("the bundle has no such variant", name, f"It has: {', '.join(self.variants)}")
        return self.variants[name]

    def files_of(self, variant: VariantEntry | str) -> list[Path]:
        """A variant's files, the one that a runtime opens first.

        Raises:
            RequestError: It has none here (skipped, or dropped by ``keep: selected``), or one leads outside.
        """
        entry = self.variant(variant) if isinstance(variant, str) else variant
        if not entry.files:
            raise RequestError("the bundle holds no files of this variant", entry.id, entry.reason or None)
        paths = [self.path / name for name in entry.files]
        for path in paths:
            if not path.is_file() or not path.resolve().is_relative_to(self.path.resolve()):
                raise RequestError("a file of the bundle is missing or leads outside", path, "Run planish verify")
        return paths

    def path_of(self, variant: VariantEntry | str) -> Path:
        """The file that a runtime opens (see `files_of`)."""
        return self.files_of(variant)[0]

    def artifact(self, variant: VariantEntry | str) -> Artifact:
        """What a target opens: file, format, signature and input contract."""
        path = self.path_of(variant)
        return Artifact(path, _FORMATS.get(path.suffix, path.suffix.lstrip(".")), self.signature, self.contract)


def read_bundle(folder: Path) -> Bundle:
    """Open a bundle for reading; whether its files are as written is `check_integrity`'s matter.

    Raises:
        RequestError: Not a folder, not a bundle, a broken manifest, or one of a newer Planish.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        kind = "not a bundle" if Path(folder).exists() else "no such bundle"
        raise RequestError(kind, folder, f"A bundle is a folder with a {MANIFEST} in it")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise RequestError("the manifest is not JSON", f"{path} ({error})", "Make the bundle again") from error
    return Bundle(Path(folder), parse_manifest(data, path))


def check_out(
    out: Path, source_digest: str, recipe_digest: str, overwrite: bool
) -> Literal["new", "up-to-date", "replace"]:
    """Decide, before any work, what writing a bundle to `out` would mean.

    Returns:
        ``"new"`` (nothing is there), ``"up-to-date"`` (an intact bundle of this source and recipe is), ``"replace"``
        (a bundle is there and `overwrite` was asked for).

    Raises:
        RequestError: Something else than a bundle is there, or a bundle that would have to be overwritten, or one
            with files of somebody else in its folder, or no folder can be made there.
        EnvironmentLackError: Writing is not allowed there, or no space is left.
    """
    out = Path(os.path.realpath(out))
    above = next(path for path in out.parents if os.path.lexists(path))
    if not above.is_dir():
        raise RequestError("a file is where a folder is needed", above, "Choose another --out")
    _refuse_long(out, above)
    _put_back(out)
    if not os.path.lexists(out):
        _try_to_write(out, above)
        return "new"
    if not (out / MANIFEST).is_file():
        raise RequestError("the output folder exists and is not a bundle", out, "Choose another --out")
    changed = _why_not_the_same(out, source_digest, recipe_digest)
    if changed is None:
        return "up-to-date"
    if not overwrite:
        raise RequestError(f"the output folder holds {changed}", out, "Choose another --out, or add --overwrite")
    _refuse_to_delete(out)
    _try_to_write(out, above)
    return "replace"


def _refuse_to_delete(out: Path) -> None:
    """Refuse to replace a folder in which files lie that its manifest does not list."""
    if others := unlisted(out):
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise RequestError(
            "overwriting would delete files that are not known to be the bundle's",
            f"{out}: {shown}",
            "Move them away first, or choose another --out",
        )


def _refuse_long(out: Path, above: Path) -> None:
    """Refuse a name that the file system at `above` does not take, with what is put around it while it is written."""
    names = [*out.relative_to(above).parts, f".{out.name}.planish-old-12345678"]
    longest, whole = os.pathconf(above, "PC_NAME_MAX"), os.pathconf(above, "PC_PATH_MAX")
    if max(len(os.fsencode(name)) for name in names) > longest or len(os.fsencode(out)) + _BELOW > whole:
        raise RequestError("the name of the output folder is too long", out, "Choose another --out, or a shorter name")


def _try_to_write(out: Path, above: Path) -> None:
    """Make a folder at `above`, the first of `out`'s folders that is there, and remove it: permissions alone do not say
    whether that works (below ``/proc``, or for root)."""
    with disk_errors(out, _REMEDY), disk_errors(above, _REMEDY):
        try:
            os.rmdir(tempfile.mkdtemp(prefix=f".{out.name}.planish-", dir=above))
        except FileNotFoundError as error:
            raise RequestError("no folder can be made there", out, "Choose another --out") from error


def _why_not_the_same(out: Path, source_digest: str, recipe_digest: str) -> str | None:
    try:
        manifest = read_bundle(out).manifest
        if manifest.source.digest != source_digest:
            return "a bundle of another source"
        if digest_of_recipe(manifest.recipe) != recipe_digest:
            return "a bundle of another recipe"
        differences = check_integrity(out)
    except RequestError as error:
        return f"a bundle that cannot be read ({error.what})"
    return f"a bundle that was changed ({differences[0]})" if differences else None


def write_bundle(files: Mapping[str, Path | bytes], manifest: Manifest, out: Path, *, replace: bool = False) -> Bundle:
    """Write a bundle: assembled in a hidden folder beside `out`, manifest last, and moved there in one step.

    Files are copied (their blocks may be shared by the file system), so editing a bundle changes nothing else. Where
    `replace` is set and a bundle is there, the two are swapped, so that at every moment one of them is in place.

    Args:
        files: Name in the bundle (with ``/``) to the file to copy or to the content.
        manifest: Its ``files`` and ``manifest_sha256`` are filled in here.
        out: The bundle's folder.
        replace: A bundle there may be replaced (what `check_out` said).

    Raises:
        RequestError: `out` appeared meanwhile.
        EnvironmentLackError: No space, or writing is not allowed there.
        InternalError: A name that leads outside, or a variant's file that is not among `files`.
    """
    if unsafe := [name for name in files if not is_safe_name(name)]:
        raise InternalError("not a name for a file of a bundle", unsafe[0])
    named = [name for variant in manifest.variants for name in variant.files]
    if missing := [name for name in named if name not in files]:
        raise InternalError("a variant's file is not in the bundle", missing[0])
    out = Path(os.path.realpath(out))
    with disk_errors(out.parent, _REMEDY):
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out.parent / f".{out.name}.planish.lock")
        lock.acquire()
        try:
            _tidy(out)
            folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.planish-", dir=out.parent))
            try:
                sealed_manifest = _assemble(folder, files, manifest)
                _publish(folder, out, replace)
            finally:
                remove_tree(folder)
        finally:
            lock.release(remove=True)
    return Bundle(out, sealed_manifest)


def _assemble(folder: Path, files: Mapping[str, Path | bytes], manifest: Manifest) -> Manifest:
    entries: dict[str, FileEntry] = {}
    for name, content in sorted(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            write_durably(path, content)
        else:
            copy_file(content, path)
        entries[name] = FileEntry(sha256=file_digest(path), bytes=path.stat().st_size)
    done = sealed(manifest, entries)
    write_durably(folder / MANIFEST, render(done.model_dump(mode="json")))
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for parent, _, _ in os.walk(folder):
        sync_folder(Path(parent))
    return done


def _publish(folder: Path, out: Path, replace: bool) -> None:
    if not os.path.lexists(out):
        os.rename(folder, out)
    elif not replace:
        raise RequestError("the output folder appeared during the run", out, "Choose another --out")
    else:
        _swap(folder, out)
    sync_folder(out.parent)


def _swap(folder: Path, out: Path) -> None:
    _refuse_to_delete(out)  # a run takes minutes: somebody may have put something there meanwhile
    if not exchange(folder, out):
        # No swap in one step here: for a moment there is no bundle, and the next `check_out` puts the old one back
        # if that is when the process ends.
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.planish-old-", dir=out.parent))
        os.rename(out, aside / out.name)
        os.rename(folder, out)
        remove_tree(aside)


def _leftovers(out: Path, kind: str = "(?:old-)?") -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(out.name)}\.planish-{kind}[a-z0-9_]{{8}}")
    beside = sorted(out.parent.iterdir()) if out.parent.is_dir() else []
    return [path for path in beside if pattern.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def _tidy(out: Path) -> None:
    """Remove what killed runs left beside `out` (the caller holds the lock, so nobody is writing there)."""
    for path in _leftovers(out):
        remove_tree(path)


def _put_back(out: Path) -> None:
    """Put a bundle back whose replacement was killed between its two renames."""
    if os.path.lexists(out) or not _leftovers(out, "old-"):
        return
    lock = FileLock(out.parent / f".{out.name}.planish.lock")
    with disk_errors(out.parent, _REMEDY):
        lock.acquire()
        try:
            for path in _leftovers(out, "old-"):
                if (path / out.name / MANIFEST).is_file() and not os.path.lexists(out):
                    os.rename(path / out.name, out)
        finally:
            lock.release(remove=True)
