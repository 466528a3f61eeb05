"""Whether a bundle is what was written: every byte, no file missing, none added, nothing that leads outside."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from exporter.digests import file_digest
from exporter.errors import RequestError
from pipelines.digests import walk_files
from pipelines.manifest import DIGEST_KEY, MANIFEST, FileEntry, is_safe_name, manifest_digest, parse_manifest, render

Kind = Literal["changed", "missing", "unlisted", "link", "unsafe"]


@dataclass(frozen=True)
class Difference:
    """One thing that is not as the manifest says.

    Attributes:
        path: The file, relative to the bundle.
        kind: ``changed``, ``missing``, ``unlisted``, ``link`` (a symbolic link, a pipe …) or ``unsafe`` (a name that
            leads outside).
        detail: What was found, for people.
    """

    path: str
    kind: Kind
    detail: str

    def __str__(self) -> str:
        return f"{self.path}: {self.kind} ({self.detail})"

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def check_integrity(folder: Path) -> list[Difference]:
    """Compare a bundle with its manifest; an empty list means that every byte is as written.

    Raises:
        RequestError: There is no bundle, or it is one of a newer Planish.
    """
    data, differences = _manifest(folder)
    if data is None:
        return differences
    files = data.get("files")
    listed = files if isinstance(files, dict) else {}
    for name, entry in listed.items():
        if not is_safe_name(name):
            differences.append(Difference(name, "unsafe", "the name leads outside the bundle"))
        elif found := _compare(folder, name, entry):
            differences.append(found)
    for path in walk_files(folder):
        name = path.relative_to(folder).as_posix()
        if name not in listed and name != MANIFEST:
            kind: Kind = "unlisted" if stat.S_ISREG(path.lstat().st_mode) else "link"
            differences.append(Difference(name, kind, "the manifest does not list it"))
    if not differences:
        parse_manifest(data, folder / MANIFEST)
    return sorted(differences, key=lambda difference: (difference.path != MANIFEST, difference.path))


def changed_files(folder: Path, names: Iterable[str], files: Mapping[str, FileEntry]) -> list[Difference]:
    """Which of these files of a bundle are not as its manifest says; names that it does not list are passed over."""
    found = (_compare(folder, name, files[name].model_dump()) for name in names if name in files)
    return [difference for difference in found if difference is not None]


def refuse(differences: Sequence[Difference]) -> None:
    """Raise an error that names the differences; nothing where there are none.

    Raises:
        RequestError: There are some.
    """
    if differences:
        told = "; ".join(map(str, differences))
        raise RequestError("a file of the bundle is not as it was written", told, "Get or make the bundle again")


def unlisted(folder: Path) -> list[str]:
    """Files in a bundle's folder that no manifest says are the bundle's: all of them where it cannot be read."""
    data, _ = _manifest(folder)
    files = data.get("files") if data else None
    if not isinstance(files, dict):
        files = {}
    names = (path.relative_to(folder).as_posix() for path in walk_files(folder))
    return [name for name in names if name not in files and name != MANIFEST]


def _manifest(folder: Path) -> tuple[dict[str, Any] | None, list[Difference]]:
    path = folder / MANIFEST
    if not folder.is_dir() or not (path.is_file() or path.is_symlink()):
        raise RequestError("not a bundle", folder, f"A bundle is a folder with a {MANIFEST} in it")
    if path.is_symlink():
        return None, [Difference(MANIFEST, "link", "the manifest is a link")]
    content = path.read_bytes()
    try:
        data = json.loads(content)
        if not isinstance(data, dict):
            raise ValueError("not an object")
        as_written = render(data) == content
        digest = manifest_digest(data)
    except (ValueError, RecursionError) as error:
        return None, [Difference(MANIFEST, "changed", f"not a manifest: {error}")]
    if digest != data.get(DIGEST_KEY):
        return data, [Difference(MANIFEST, "changed", f"its {DIGEST_KEY} does not fit")]
    if not as_written:
        return data, [Difference(MANIFEST, "changed", "not written as Planish writes it")]
    return data, []


def _compare(folder: Path, name: str, entry: Any) -> Difference | None:
    path = folder / name
    for parent in path.relative_to(folder).parents:
        if (folder / parent).is_symlink() and folder / parent != folder:
            return Difference(name, "link", f"{parent} is a link")
    try:
        state = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return Difference(name, "missing", "the manifest lists it")
    except OSError as error:
        return Difference(name, "unsafe", str(error.strerror))
    if not stat.S_ISREG(state.st_mode):
        return Difference(name, "link", "not a regular file")
    expected = entry if isinstance(entry, dict) else {}
    if state.st_size != expected.get("bytes"):
        return Difference(name, "changed", f"{state.st_size} bytes instead of {expected.get('bytes')}")
    if file_digest(path) != expected.get("sha256"):
        return Difference(name, "changed", "its SHA-256 differs")
    return None
