"""`planish engine --check` on a real bundle, with the real TensorRT for RTX. Skips without the package."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from exporter.artifact import Axis, Signature, TensorSpec
from exporter.digests import file_digest
from pipelines.manifest import DIGEST_KEY, manifest_digest
from pipelines.preflight import points_of
from tests.pipelines.jobs import export, planish

NEEDS_RTX = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 is not installed"
)
Planish = Callable[..., tuple[int, str, str]]


def test_operating_points_become_lengths_of_axes() -> None:
    text = Signature(
        (TensorSpec("ids", "int64", ("batch", "tokens")),), (), (Axis("batch", 1, 64), Axis("tokens", 2, 512))
    )
    assert points_of(text, ["1x16", "8"]) == [{"batch": 1, "tokens": 16}, {"batch": 8, "tokens": 2}]
    fixed = Signature((TensorSpec("x", "float32", (1, 3)),), ())
    assert points_of(fixed, ["1"]) == [{}]


@pytest.fixture(scope="module")
def nvidia(
    model_folder: Callable[..., Path], cache: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle with every precision for TensorRT for RTX, and nothing else."""
    out = tmp_path_factory.mktemp("nvidia") / "bundle"
    asked = ["targets=[onnxruntime-cpu, tensorrt-rtx]", "precisions=[fp32, fp16, bf16, int8]"]
    done = export(model_folder("bert"), out, cache, *asked, options=["--data", texts])
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
@NEEDS_RTX
def test_every_file_for_tensorrt_is_built(nvidia: Path, cache: Path) -> None:
    done = planish("engine", nvidia, "--check", "--json", cache=cache)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["ok"]
    built = {(engine["variant"], engine["gpu"]): engine for engine in document["engines"]}
    names = [f"tensorrt-rtx-{end}" for end in ("fp32", "fp16", "bf16", "int8-static-smooth")]
    assert set(built) == {(name, gpu) for name in names for gpu in ("SM89", "SM120")}
    for engine in built.values():
        assert engine["bytes"] > 0
        assert sum(engine["layers"].values()) > 0
    for name, kind in zip(names, ("Float", "Half", "BFloat16", "Int8"), strict=True):
        assert set(built[name, "SM89"]["products"]) == {kind}
    shown = planish("engine", nvidia, "--check", "--gpu", "SM89", cache=cache)
    assert shown.returncode == 0, shown.stderr
    assert "NVIDIA's builder takes every file" in shown.stdout
    assert "SM120" not in shown.stdout


@pytest.mark.slow
@NEEDS_RTX
def test_a_file_that_the_parser_refuses_is_named_with_its_node(nvidia: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(nvidia, out)
    manifest = json.loads((out / "planish.json").read_text(encoding="utf-8"))
    path = out / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Add" and "/" in node.name)
    model.graph.node.insert(
        list(model.graph.node).index(node),
        helper.make_node("Cast", [node.input[0]], ["planted"], name="planted", to=TensorProto.FLOAT16),
    )
    node.input[0] = "planted"
    onnx.save(model, path)
    changed = planish("engine", out, "--check", cache=cache)
    assert changed.returncode == 2
    assert "onnx/model.onnx" in changed.stderr  # its digest is not the manifest's

    entry = manifest["files"]["onnx/model.onnx"]
    entry["sha256"], entry["bytes"] = file_digest(path), path.stat().st_size
    manifest[DIGEST_KEY] = manifest_digest(manifest)
    (out / "planish.json").write_text(json.dumps(manifest), encoding="utf-8")
    done = planish("engine", out, "--check", cache=cache)
    assert done.returncode == 1, done.stderr
    assert "refused: onnx/model.onnx" in done.stdout
    assert repr(node.name) in done.stdout.replace("\n", "")


@pytest.mark.slow
@NEEDS_RTX
def test_a_gpu_that_the_builder_does_not_know(nvidia: Path, cache: Path) -> None:
    done = planish("engine", nvidia, "--check", "--gpu", "SM90", cache=cache)
    assert done.returncode == 2
    assert "SM90" in done.stderr
    assert "SM89" in done.stderr


@pytest.mark.slow
def test_what_cannot_be_checked(bundle: Path, here: Planish, tmp_path: Path) -> None:
    status, _, err = here("engine", bundle, "--check")
    assert status == 2
    assert "no file for TensorRT" in err
    status, _, err = here("engine", tmp_path, "--check")
    assert status == 2
    status, _, err = here("engine", bundle, "--check", "--out", tmp_path / "engines")
    assert status == 2
    assert "with --check nothing is kept" in err


@pytest.mark.slow
@NEEDS_RTX
def test_engines_are_kept_with_what_they_were_built_for(nvidia: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "engines"
    done = planish("engine", nvidia, "--out", out, "--gpu", "SM89", "--json", cache=cache)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert {path.name for path in tmp_path.iterdir()} == {"engines"}
    assert len(document["engines"]) == 4
    trusted = {path.name for path in (cache / "engines").iterdir()}
    for told in document["engines"]:
        engine = Path(told["engine"])
        assert engine == out / f"{told['variant']}-sm89" / "model.plan"
        sheet = json.loads((engine.parent / "fingerprint.json").read_text(encoding="utf-8"))
        assert sheet["sha256"] == file_digest(engine)
        assert sheet["sha256"] in trusted
        assert sheet["fingerprint"]["gpus"] == ["8.9"]
        assert sheet["fingerprint"]["onnx"] == file_digest(nvidia / told["file"])
    again = planish("engine", nvidia, "--out", out, cache=cache)
    assert again.returncode == 2
    assert "is there already" in again.stderr
