from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.artifact import Axis, InputContract, Signature, TensorSpec
from exporter.errors import EnvironmentLackError, InternalError, RequestError
from pipelines import bundle as subject
from pipelines.bundle import check_integrity, check_out, read_bundle, write_bundle
from pipelines.manifest import InputContractEntry, Manifest, manifest_digest, parse_manifest, render
from pipelines.recipe import Recipe
from tests.pipelines.jobs import files_under

SOURCE = "sha256:" + "1" * 64
RECIPE = Recipe(source="a:b", threads=2)
FILES: dict[str, Path | bytes] = {
    "config.json": b"{}\n",
    "onnx/model.onnx": b"graph" * 20,
    "onnx/model.onnx_data": b"\0weights",
    "evidence/parity.json": b"[]",
    "empty.txt": b"",
}
SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", 3)),), (TensorSpec("y", "float32", ("batch",)),), (Axis("batch", 1, 8),)
)


def manifest(name: str = "tiny", recipe: Recipe = RECIPE, source: str = SOURCE) -> Manifest:
    def variant(target: str, status: str, files: list[str]) -> dict[str, Any]:
        return {"id": f"{target}-fp32", "target": target, "precision": "fp32", "files": files, "status": status,
                "reason": "no device" if status == "skipped" else ""}  # fmt: skip

    return parse_manifest(
        {
            "planish_version": "0.1.0",
            "name": name,
            "task": "custom",
            "created": "2026-01-02T03:04:05+00:00",
            "source": {"kind": "factory", "digest": source},
            "recipe": recipe.resolved(),
            "input_contract": InputContractEntry.of(SIGNATURE, InputContract()).model_dump(mode="json"),
            "variants": [
                variant("onnxruntime-cpu", "passed", ["onnx/model.onnx", "onnx/model.onnx_data"]),
                variant("tensorrt", "skipped", []),
            ],
            "selected": {"overall": "onnxruntime-cpu-fp32", "1x16": None},
        },
        Path("planish.json"),
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "made" / "bundle"


@pytest.fixture
def written(out: Path) -> Path:
    return write_bundle(FILES, manifest(), out).path


def beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


def names(folder: Path) -> list[tuple[str, str]]:
    return [(difference.path, difference.kind) for difference in check_integrity(folder)]


def test_written_and_read(written: Path) -> None:
    assert beside(written) == ["bundle"]
    assert check_integrity(written) == []
    bundle = read_bundle(written)
    assert set(bundle.manifest.files) == set(FILES)
    assert list(bundle.variants) == ["onnxruntime-cpu-fp32", "tensorrt-fp32"]
    chosen = bundle.selected()
    assert chosen is not None
    assert bundle.selected("1x16") is None
    assert bundle.path_of(chosen) == written / "onnx/model.onnx"
    assert bundle.files_of("onnxruntime-cpu-fp32")[1] == written / "onnx/model.onnx_data"
    artifact = bundle.artifact(chosen)
    assert (artifact.format, artifact.signature, artifact.contract) == ("onnx", SIGNATURE, InputContract())
    with pytest.raises(RequestError, match=r"no files of this variant: tensorrt-fp32\. no device"):
        bundle.path_of("tensorrt-fp32")
    with pytest.raises(RequestError, match=r"no such variant: x\. It has: onnxruntime-cpu-fp32"):
        bundle.path_of("x")
    with pytest.raises(RequestError, match=r"no such operating point: 9x9"):
        bundle.selected("9x9")


def test_readable_by_others(written: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert written.stat().st_mode & 0o777 == 0o777 & ~mask
    assert (written / "onnx/model.onnx").stat().st_mode & 0o777 == 0o666 & ~mask


def test_moved_bundle_is_intact(written: Path, tmp_path: Path) -> None:
    shutil.move(written, tmp_path / "elsewhere")
    assert check_integrity(tmp_path / "elsewhere") == []


def test_files_are_copies_not_links(tmp_path: Path, out: Path) -> None:
    kept = tmp_path / "cache/model.onnx"
    kept.parent.mkdir()
    kept.write_bytes(b"x" * 3_000_000)
    (tmp_path / "cache/link").symlink_to(kept)
    files: dict[str, Path | bytes] = {**FILES, **files_under(tmp_path / "cache", "extra/")}
    bundle = write_bundle(files, manifest(), out)
    for name in ("extra/model.onnx", "extra/link"):
        copy = bundle.path / name
        assert not copy.is_symlink()
        assert (copy.stat().st_nlink, copy.stat().st_size) == (1, 3_000_000)
        copy.write_bytes(b"edited")
    assert kept.read_bytes() == b"x" * 3_000_000


def test_copying_without_help_of_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import disk

    monkeypatch.setattr(disk, "_copy_in_kernel", lambda reader, writer: False)
    (tmp_path / "a").write_bytes(b"abc" * 1_000_000)
    disk.copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"abc" * 1_000_000


def test_every_changed_byte_is_found_and_its_file_named(written: Path) -> None:
    order = random.Random(0)
    for path in sorted(p for p in written.rglob("*") if p.is_file()):
        content = path.read_bytes()
        name = path.relative_to(written).as_posix()
        step = 1 if len(content) < 1000 else 5  # the manifest is long
        for position in range(order.randrange(step), len(content), step):
            changed = bytearray(content)
            changed[position] ^= order.randrange(1, 256)
            path.write_bytes(changed)
            assert (name, "changed") in names(written), (name, position)
        path.write_bytes(content)
    assert check_integrity(written) == []


def test_white_space_of_the_manifest_counts_too(written: Path) -> None:
    path = written / "planish.json"
    content = path.read_bytes()
    for changed in (content.replace(b"\n", b" ", 1), content + b"\n", content[:-1], content.replace(b": ", b":\t", 1)):
        path.write_bytes(changed)
        assert names(written) == [("planish.json", "changed")]


def test_key_given_twice_in_the_manifest(written: Path) -> None:
    path = written / "planish.json"
    path.write_bytes(path.read_bytes().replace(b'  "name"', b'  "name": "evil",\n  "name"', 1))
    assert names(written) == [("planish.json", "changed")]


def _symlink_file(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to(folder.parent / "config.json")


def _symlink_folder(folder: Path) -> None:
    (folder / "evidence").rename(folder.parent / "evidence")
    (folder / "evidence").symlink_to(folder.parent / "evidence")


def _symlink_manifest(folder: Path) -> None:
    (folder / "planish.json").rename(folder.parent / "planish.json")
    (folder / "planish.json").symlink_to(folder.parent / "planish.json")


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda b: (b / "config.json").unlink(), [("config.json", "missing")]),
        (lambda b: shutil.rmtree(b / "evidence"), [("evidence/parity.json", "missing")]),
        (lambda b: (b / "config.json").write_bytes(b"{}\n\n"), [("config.json", "changed")]),
        (lambda b: (b / "empty.txt").write_bytes(b"x"), [("empty.txt", "changed")]),
        (lambda b: (b / "onnx/new.bin").write_bytes(b""), [("onnx/new.bin", "unlisted")]),
        (lambda b: (b / ".hidden").write_bytes(b""), [(".hidden", "unlisted")]),
        (lambda b: (b / "sub").symlink_to("/etc"), [("sub", "link")]),
        (lambda b: (b / "dangling").symlink_to("nowhere"), [("dangling", "link")]),
        (lambda b: os.mkfifo(b / "pipe"), [("pipe", "link")]),
        (_symlink_file, [("config.json", "link")]),
        (_symlink_folder, [("evidence", "link"), ("evidence/parity.json", "link")]),
        (_symlink_manifest, [("planish.json", "link")]),
        (lambda b: ((b / "config.json").unlink(), (b / "config.json").mkdir()), [("config.json", "link")]),
        (lambda b: (b / "planish.json").write_bytes(b""), [("planish.json", "changed")]),
        (lambda b: (b / "planish.json").write_bytes(b"[" * 100_000), [("planish.json", "changed")]),
        (lambda b: (b / "planish.json").write_bytes(b"\xff\xfe"), [("planish.json", "changed")]),
    ],
)
def test_damage_is_found(written: Path, damage: Callable[[Path], object], found: list[tuple[str, str]]) -> None:
    damage(written)
    assert names(written) == found


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest as somebody would who can compute its digest."""
    data = json.loads((folder / "planish.json").read_bytes())
    change(data)
    data["manifest_sha256"] = manifest_digest(data)
    (folder / "planish.json").write_bytes(render(data))


@pytest.mark.parametrize("name", ["../outside", "/etc/hosts", "onnx/../../outside", "a\\b", ""])
def test_names_that_lead_outside_are_unsafe(written: Path, name: str) -> None:
    (written.parent / "outside").write_bytes(b"")
    forge(written, lambda data: data["files"].update({name: {"sha256": "0" * 64, "bytes": 0}}))
    assert (name, "unsafe") in names(written)


def test_variant_whose_file_leads_outside_is_not_opened(written: Path) -> None:
    forge(written, lambda data: data["variants"][0].update(files=["../outside"]))
    with pytest.raises(RequestError, match="no path inside the bundle"):
        read_bundle(written)
    with pytest.raises(RequestError, match="no path inside the bundle"):
        check_integrity(written)


def test_variant_whose_file_is_a_link_outside_is_not_opened(written: Path) -> None:
    (written / "onnx/model.onnx").rename(written.parent / "model.onnx")
    (written / "onnx/model.onnx").symlink_to(written.parent / "model.onnx")
    with pytest.raises(RequestError, match="leads outside"):
        read_bundle(written).path_of("onnxruntime-cpu-fp32")


def test_what_is_no_bundle(tmp_path: Path, written: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "gone", tmp_path / "file"):
        for read in (read_bundle, check_integrity):
            with pytest.raises(RequestError, match=r"not a bundle|no such bundle"):
                read(path)
    (written / "planish.json").write_text("{")
    with pytest.raises(RequestError, match="not JSON"):
        read_bundle(written)


def test_bundle_of_a_newer_planish(written: Path) -> None:
    forge(written, lambda data: data.update(schema_version=2, more=1))
    for read in (read_bundle, check_integrity):
        with pytest.raises(RequestError, match="newer Planish"):
            read(written)


def test_check_out(written: Path, tmp_path: Path) -> None:
    digest = RECIPE.digest()
    assert check_out(tmp_path / "no/where", SOURCE, digest, False) == "new"
    assert check_out(written, SOURCE, digest, False) == "up-to-date"
    assert check_out(written, SOURCE, digest, True) == "up-to-date"
    with pytest.raises(RequestError, match=r"bundle of another source.*--overwrite"):
        check_out(written, "sha256:" + "2" * 64, digest, False)
    with pytest.raises(RequestError, match=r"bundle of another recipe.*--overwrite"):
        check_out(written, SOURCE, Recipe(source="a:b", threads=2, seed=1).digest(), False)
    assert check_out(written, SOURCE, "x", True) == "replace"
    assert check_out(written, "x", digest, True) == "replace"


def test_check_out_of_a_damaged_bundle(written: Path) -> None:
    (written / "config.json").write_bytes(b"{ }")
    with pytest.raises(RequestError, match=r"was changed \(config\.json"):
        check_out(written, SOURCE, RECIPE.digest(), False)
    assert check_out(written, SOURCE, RECIPE.digest(), True) == "replace"


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"files": 3}'])
def test_where_the_manifest_cannot_be_read_no_file_is_known_to_be_the_bundles(written: Path, content: bytes) -> None:
    (written / "planish.json").write_bytes(content)
    with pytest.raises(RequestError, match="cannot be read"):
        check_out(written, SOURCE, RECIPE.digest(), False)
    with pytest.raises(RequestError, match=r"would delete files.*config\.json"):
        check_out(written, SOURCE, RECIPE.digest(), True)


def test_what_appeared_during_the_run_is_not_deleted(written: Path) -> None:
    assert check_out(written, SOURCE, "x", True) == "replace"
    (written / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match=r"would delete files.*notes\.txt"):
        write_bundle(FILES, manifest("second"), written, replace=True)
    assert (written / "notes.txt").read_text() == "mine"
    assert read_bundle(written).manifest.name == "tiny"
    assert beside(written) == ["bundle"]


def test_check_out_never_takes_files_of_somebody_else(written: Path, tmp_path: Path) -> None:
    for overwrite in (False, True):
        for place in (tmp_path / "folder", tmp_path / "full"):
            place.mkdir(exist_ok=True)
        (tmp_path / "full/notes.txt").write_text("mine")
        (tmp_path / "file").write_text("mine")
        for place in (tmp_path / "folder", tmp_path / "full", tmp_path / "file"):
            with pytest.raises(RequestError, match="exists and is not a bundle"):
                check_out(place, SOURCE, "x", overwrite)
        with pytest.raises(RequestError, match="a file is where a folder is needed"):
            check_out(tmp_path / "file/below/it", SOURCE, "x", overwrite)
    (written / ".git").mkdir()
    (written / ".git/config").write_text("mine")
    with pytest.raises(RequestError, match=r"would delete files.*\.git/config"):
        check_out(written, SOURCE, "x", True)


def test_existing_folder_is_replaced_only_when_asked(written: Path) -> None:
    with pytest.raises(RequestError, match="appeared during the run"):
        write_bundle(FILES, manifest("second"), written)
    assert read_bundle(written).manifest.name == "tiny"
    write_bundle({**FILES, "new.txt": b"new"}, manifest("second"), written, replace=True)
    assert read_bundle(written).manifest.name == "second"
    assert check_integrity(written) == []
    assert beside(written) == ["bundle"]


def test_out_that_is_a_link_keeps_being_one(written: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(written)
    write_bundle(FILES, manifest("second"), link, replace=True)
    assert link.is_symlink()
    assert read_bundle(written).manifest.name == "second"


def test_at_every_moment_a_whole_bundle_is_in_place(written: Path) -> None:
    seen: list[Exception] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            try:
                read_bundle(written)
            except Exception as error:
                seen.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    for number in range(30):
        write_bundle(FILES, manifest(f"n{number}"), written, replace=True)
    done.set()
    thread.join()
    assert seen == []
    assert read_bundle(written).manifest.name == "n29"


def test_replacing_where_names_cannot_be_swapped(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "exchange", lambda first, second: False)
    write_bundle(FILES, manifest("second"), written, replace=True)
    assert read_bundle(written).manifest.name == "second"
    assert beside(written) == ["bundle"]


def test_killed_between_two_renames_the_old_bundle_comes_back(written: Path) -> None:
    aside = written.parent / ".bundle.planish-old-abcdefgh"
    aside.mkdir()
    written.rename(aside / "bundle")
    assert check_out(written, SOURCE, RECIPE.digest(), False) == "up-to-date"
    write_bundle(FILES, manifest("second"), written, replace=True)
    assert beside(written) == ["bundle"]


def test_two_writers_take_turns(written: Path) -> None:
    failed: list[Exception] = []

    def write(name: str) -> None:
        try:
            for _ in range(5):
                write_bundle(FILES, manifest(name), written, replace=True)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert check_integrity(written) == []
    assert beside(written) == ["bundle"]


WRITER = """
import sys
from pathlib import Path
from pipelines.bundle import write_bundle
from pipelines.manifest import parse_manifest
import json
out, pipe, data = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
print("writing", flush=True)
write_bundle({"a.txt": b"x" * 100000, "b.bin": pipe}, parse_manifest(data, out), out, replace=True)
"""


@pytest.mark.parametrize("replace", [False, True])
def test_kill_9_while_writing(tmp_path: Path, out: Path, replace: bool) -> None:
    if replace:
        write_bundle(FILES, manifest(), out)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # whoever copies it waits for a writer: here the process is caught in the middle
    data = manifest().model_dump(mode="json")
    data["variants"], data["selected"] = [], {"overall": None}
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(out), str(pipe), json.dumps(data)])
    with pipe.open("wb") as feeder:  # opens when the process opens the other end
        feeder.write(b"half")
        feeder.flush()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert any(name.startswith(".bundle.planish-") for name in beside(out))
    if replace:
        assert check_integrity(out) == []
        assert read_bundle(out).manifest.name == "tiny"
    else:
        assert not out.exists()
    write_bundle(FILES, manifest("next"), out, replace=replace)
    assert read_bundle(out).manifest.name == "next"
    assert beside(out) == ["bundle"]


def test_leftovers_are_told_from_other_peoples_files(written: Path, tmp_path: Path) -> None:
    keep = [".bundle.planish-notes", ".bundle2.planish-abcdefgh", "bundle.planish-abcdefgh"]
    for name in keep:
        (written.parent / name).mkdir()
    (written.parent / ".bundle.planish-zyxwvuts").symlink_to(tmp_path)
    write_bundle(FILES, manifest(), written, replace=True)
    assert set(beside(written)) == {*keep, ".bundle.planish-zyxwvuts", "bundle"}


def test_full_disk_leaves_the_old_bundle_and_nothing_else(small_disk: Path, tmp_path: Path) -> None:
    out = small_disk / "bundle"
    write_bundle(FILES, manifest(), out)
    big = tmp_path / "big"
    big.write_bytes(b"x" * (1 << 20))
    with pytest.raises(EnvironmentLackError, match="no space left"):
        write_bundle({**FILES, "big": big}, manifest("second"), out, replace=True)
    assert beside(out) == ["bundle"]
    assert check_integrity(out) == []


def test_folder_that_cannot_be_written(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for out in (small_disk / "bundle", small_disk / "below/bundle"):
        with pytest.raises(EnvironmentLackError, match=r"not allowed.*Choose another --out"):
            write_bundle(FILES, manifest(), out)


def test_failure_half_way_leaves_nothing(out: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_bundle({**FILES, "gone": tmp_path / "gone"}, manifest(), out)
    assert beside(out) == []


def test_files_and_variants_must_fit_together(out: Path) -> None:
    with pytest.raises(InternalError, match=r"onnx/model\.onnx_data"):
        write_bundle({"onnx/model.onnx": b""}, manifest(), out)
    for name in ("../x", "planish.json", "/x"):
        with pytest.raises(InternalError, match="not a name"):
            write_bundle({**FILES, name: b""}, manifest(), out)
    assert not out.parent.exists()
