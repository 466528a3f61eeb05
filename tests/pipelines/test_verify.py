"""`planish verify`: a released bundle proves itself anywhere, and one that was changed does not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.digests import file_digest
from exporter.sources import resolve_source
from pipelines import verify
from pipelines.bundle import check_integrity
from pipelines.manifest import DIGEST_KEY, MANIFEST, manifest_digest, render
from tests.models import make_model
from tests.pipelines.jobs import digests, manifest, planish, settings

pytestmark = pytest.mark.slow
ORT = "onnxruntime-cpu-fp32"
ENGINE = "inductor-cpu-fp32"
Folders = Callable[..., Path]
Planish = Callable[..., tuple[int, str, str]]


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache: nothing is remembered of the run that made a bundle."""
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "empty"))
    return tmp_path / "empty"


@pytest.fixture
def copy(bundle: Path, tmp_path: Path, nothing: Path) -> Path:
    """The bundle somewhere else, under another name."""
    return shutil.copytree(bundle, tmp_path / "else where" / "released")


def test_a_moved_bundle_verifies(copy: Path, nothing: Path) -> None:
    before = digests(copy)
    done = planish("verify", copy, "--no-latency", cache=nothing)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verified" in done.stdout
    assert digests(copy) == before
    done = planish("verify", "released", "--no-latency", "--json", cwd=copy.parent, cache=nothing)
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert found["ok"] is True
    assert found["differences"] == []
    assert {name: entry["status"] for name, entry in found["variants"].items()} == {
        ORT: "passed",
        f"{ORT}-fused": "passed",
    }
    gates = found["variants"][ORT]["gates"]
    assert {name: gate["verdict"] for name, gate in gates.items()} == {"parity": "passed", "quality": "passed"}
    assert gates["parity"]["cases"], "nothing was compared"


def test_latency_is_measured_against_the_bundle_itself(copy: Path) -> None:
    found = verify(copy, budget_s=1.0)
    assert found.ok
    assert found.latency["baseline"] == ORT
    assert found.latency["points"] == ["1x8"]
    assert found.latency["variants"][f"{ORT}-fused"]["points"]["1x8"]["speedup"] > 0


def test_a_flipped_byte_in_any_file_is_found_and_the_file_is_named(copy: Path) -> None:
    rng = np.random.default_rng(0)
    paths = [path for path in sorted(copy.rglob("*")) if path.is_file()]
    assert len(paths) > 15
    for path in paths:
        content = path.read_bytes()
        place = int(rng.integers(len(content)))
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << int(rng.integers(8)))]) + content[place + 1 :])
        found = verify(copy)
        assert not found.ok
        assert [difference.path for difference in found.differences] == [path.relative_to(copy).as_posix()]
        assert found.variants == {}, "a changed bundle was opened"
        path.write_bytes(content)
    assert check_integrity(copy) == []


@pytest.mark.parametrize("name", ["onnx/model.onnx", "config.json", "report.html", "evidence/parity.json", MANIFEST])
def test_the_command_fails_and_names_the_file(copy: Path, here: Planish, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    status, out, err = here("verify", copy, "--quiet")
    assert status == 1
    assert name in out
    assert "Traceback" not in err
    status, out, err = here("verify", copy, "--quiet", "--json")
    assert (status, err) == (1, "")
    assert json.loads(out)["ok"] is False
    assert [(d["path"], d["kind"]) for d in json.loads(out)["differences"]] == [(name, "changed")]


def test_a_changed_bundle_is_not_timed(copy: Path, here: Planish) -> None:
    status, out, err = here("bench", copy, "--budget-s", "1")
    assert status == 0, err
    assert ORT in out
    content = bytearray((copy / "onnx/model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "onnx/model.onnx").write_bytes(content)
    status, out, err = here("bench", copy, "--budget-s", "1", "--quiet")
    assert (status, out) == (1, "")
    assert "onnx/model.onnx: changed" in err


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), ("tokenizer.json", "missing")),
        (lambda folder: (folder / "variants" / "more.bin").write_bytes(b"x"), ("variants/more.bin", "unlisted")),
        (lambda folder: (folder / ".hidden").write_bytes(b""), (".hidden", "unlisted")),
        (lambda folder: (folder / MANIFEST).unlink(), (MANIFEST, "missing")),
        (lambda folder: (folder / MANIFEST).write_text("{}"), (MANIFEST, "changed")),
    ],
    ids=["missing", "unlisted", "hidden", "no-manifest", "empty-manifest"],
)
def test_missing_and_unlisted_files(
    copy: Path, here: Planish, change: Callable[[Path], Any], expected: tuple[str, str]
) -> None:
    change(copy)
    status, out, _ = here("verify", copy, "--quiet")
    assert status == 1
    assert f"{expected[1]}: {expected[0]}" in out


def test_what_is_no_bundle(here: Planish, model_folder: Folders, tmp_path: Path, nothing: Path) -> None:
    for place in (tmp_path / "missing", model_folder("bert"), model_folder("bert") / "config.json"):
        status, out, err = here("verify", place)
        assert (status, out) == (2, "")
        assert "bundle" in err
        assert "Traceback" not in err


def test_an_engine_is_opened_only_when_trusted(classifier: Path, tmp_path: Path, nothing: Path) -> None:
    moved = shutil.copytree(classifier, tmp_path / "moved")
    done = planish("verify", moved, "--no-latency", "--json", cache=nothing)
    found = json.loads(done.stdout)
    assert done.returncode == 0, found
    assert found["variants"][ENGINE]["status"] == "skipped"
    assert "--trust" in found["variants"][ENGINE]["reason"]
    assert found["variants"][ORT]["status"] == "passed"
    trusted = planish("verify", moved, "--no-latency", "--json", "--trust", cache=nothing)
    assert trusted.returncode == 0
    assert json.loads(trusted.stdout)["variants"][ENGINE]["status"] == "passed"


def test_an_engine_of_this_users_own_cache_is_opened(
    classifier: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(cache))
    found = verify(classifier, latency=False)
    assert found.variants[ENGINE]["status"] == "passed", found.variants[ENGINE]["reason"]


def test_against_the_source(copy: Path, here: Planish, model_folder: Folders, tmp_path: Path) -> None:
    # the source, wherever it lies
    source = shutil.copytree(model_folder("bert"), tmp_path / "source")
    status, out, err = here("verify", copy, "--no-latency", "--against", source, "--json", "--quiet")
    assert (status, err) == (0, "")
    assert json.loads(out)["source"]["verdict"] == "passed"
    assert json.loads(out)["source"]["cases"]


def test_against_another_source(copy: Path, here: Planish, tmp_path: Path) -> None:
    other = make_model("bert", tmp_path / "other", seed=1)
    status, out, _ = here("verify", copy, "--no-latency", "--against", other, "--quiet")
    assert status == 1
    assert "digest" in out
    assert "NOT verified" in out


def test_against_what_is_no_source(copy: Path, here: Planish, tmp_path: Path) -> None:
    status, _, err = here("verify", copy, "--no-latency", "--against", tmp_path / "nowhere", "--quiet")
    assert status == 2
    assert "nowhere" in err


def test_a_manifest_gives_no_trust_in_the_code_of_a_source(copy: Path, here: Planish, model_folder: Folders) -> None:
    source = shutil.copytree(model_folder("bert"), copy.parent / "source")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ran = copy.parent / "ran"
    (source / "theirs.py").write_text(
        "from transformers import BertConfig as Config, BertModel as Model\n"
        f"from pathlib import Path\nPath({str(ran)!r}).write_text('')\n",
        encoding="utf-8",
    )
    digest = resolve_source(str(source), trust_remote_code=True).digest
    reseal(copy, lambda data: (data["recipe"].update(trust_remote_code=True), data["source"].update(digest=digest)))
    command = ["verify", copy, "--no-latency", "--against", source, "--quiet"]
    status, _, err = here(*command)
    assert status == 2
    assert "--trust" in err
    assert not ran.exists(), "the code ran"
    here(*command, "--trust")
    assert ran.exists()


def test_a_resealed_bundle_with_another_model_fails_parity(copy: Path, here: Planish) -> None:
    """Digests that fit prove nothing about the model: the golden samples do."""
    import onnx
    from onnx import numpy_helper

    path = copy / "onnx" / "model.onnx"
    model = onnx.load(path)
    rng = np.random.default_rng(1)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.ndim == 2:
            tensor.CopyFrom(numpy_helper.from_array(rng.permuted(array.ravel()).reshape(array.shape), tensor.name))
    onnx.save(model, path)
    reseal(copy)
    assert check_integrity(copy) == []
    status, out, err = here("verify", copy, "--no-latency", "--json", "--quiet")
    assert (status, err) == (1, "")
    found = json.loads(out)["variants"]
    assert found[ORT]["status"] == "failed"
    assert found[ORT]["gates"]["parity"]["verdict"] == "failed"
    assert found[f"{ORT}-fused"]["status"] == "passed"


def test_what_could_not_run_where_the_bundle_was_made_is_judged_where_it_can(copy: Path, here: Planish) -> None:
    """As one for a GPU on a machine with one; here one for the processor stands for it. It cannot fail the bundle."""
    fused = f"{ORT}-fused"

    def skip(data: dict[str, Any]) -> None:
        entry = next(entry for entry in data["variants"] if entry["id"] == fused)
        entry.update(status="skipped", reason="there was no such device", executed=None)

    reseal(copy, skip)
    status, out, _ = here("verify", copy, "--no-latency", "--json", "--quiet")
    found = json.loads(out)["variants"][fused]
    assert (status, found["status"], found["before"]) == (0, "passed", "skipped")
    assert found["gates"]["parity"]["cases"], "nothing was compared"
    assert found["executed"]["provider"] == "CPUExecutionProvider"
    path = copy / "variants" / fused / "model_fused.onnx"
    os.truncate(path, path.stat().st_size // 2)
    reseal(copy)
    status, out, _ = here("verify", copy, "--no-latency", "--json", "--quiet")
    assert (status, json.loads(out)["variants"][fused]["status"]) == (0, "failed")


def test_a_resealed_bundle_with_a_broken_graph_fails(copy: Path, here: Planish) -> None:
    path = copy / "onnx" / "model.onnx"
    os.truncate(path, path.stat().st_size // 2)
    reseal(copy)
    status, out, err = here("verify", copy, "--no-latency", "--quiet")
    assert status == 1
    assert "failed" in out
    assert "Traceback" not in err


def test_labelled_pictures_are_judged_by_their_labels(
    here: Planish, model_folder: Folders, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.setenv("PLANISH_CACHE", str(cache))
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "label": ["bad", "fair", "good"][i % 3]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = [*settings("latency.points=['1']"), "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out"]
    status, _, err = here("export", model_folder("vit"), *asked, "--quiet")
    assert status == 0, err
    found = verify(tmp_path / "out", latency=False)
    quality = found.variants[ORT]["gates"]["quality"]
    assert (found.ok, quality["verdict"], quality["metric"], quality["samples"]) == (True, "passed", "top-1", 32)


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda data: None) -> None:
    """Write the manifest anew for the files as they are, as somebody who can run Planish could."""
    data = manifest(folder)
    change(data)
    for name in data["files"]:
        data["files"][name] = {"sha256": file_digest(folder / name), "bytes": (folder / name).stat().st_size}
    data[DIGEST_KEY] = manifest_digest(data)
    (folder / MANIFEST).write_bytes(render(data))
