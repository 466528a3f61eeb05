"""`planish engine --check` on a real bundle, with the real TensorRT for RTX. Skips without the package."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from exporter.artifact import Axis, Signature, TensorSpec
from exporter.digests import file_digest
from exporter.errors import RequestError
from pipelines.manifest import DIGEST_KEY, manifest_digest
from pipelines.preflight import capability, points_of
from tests.pipelines.jobs import COMMAND, environment, export, planish

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
    asked = ["targets=[onnxruntime-cpu, tensorrt-rtx]", "precisions=[fp32, fp16, bf16, int8, fp8]"]
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
    names = [f"tensorrt-rtx-{end}" for end in ("fp32", "fp16", "bf16", "int8-static-smooth", "fp8")]
    assert set(built) == {(name, gpu) for name in names for gpu in ("SM89", "SM120")}
    for engine in built.values():
        assert engine["bytes"] > 0
        assert sum(engine["layers"].values()) > 0
    for name, kind in zip(names, ("Float", "Half", "BFloat16", "Int8", "FP8"), strict=True):
        for gpu in ("SM89", "SM120"):
            assert set(built[name, gpu]["products"]) == {kind}
    shown = planish("engine", nvidia, "--check", "--gpu", "SM89", cache=cache)
    assert shown.returncode == 0, shown.stderr
    assert "NVIDIA's builder takes every file" in shown.stdout
    assert "SM120" not in shown.stdout


@pytest.mark.slow
@NEEDS_RTX
def test_gpus_that_lack_a_precision_are_told_with_what_to_take(nvidia: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "engines"
    done = planish("engine", nvidia, "--out", out, "--gpu", "7.5", "--gpu", "8.6", "--json", cache=cache)
    assert done.returncode == 1, done.stderr
    engines = json.loads(done.stdout)["engines"]
    refused = {(one["file"], one["gpu"]): one for one in engines if not one["ok"]}
    turing = [f"onnx/model{end}.onnx" for end in ("", "_bf16", "_int8_tensorrt", "_fp8")]
    assert set(refused) == {*((name, "SM75") for name in turing), ("onnx/model_fp8.onnx", "SM86")}
    assert not any(one["crashed"] for one in engines)
    fp8 = refused["onnx/model_fp8.onnx", "SM86"]
    assert fp8["reason"] == "GPUs of compute capability 8.6 have no FP8: model_fp8.onnx"
    assert fp8["remedy"] == "FP8 takes compute capability 8.9 (Ada) or later: for these GPUs take int8 or fp16 instead"
    assert "FP16 only" in refused["onnx/model_int8_tensorrt.onnx", "SM75"]["reason"]
    built = {f"{one['variant']}-{one['gpu'].lower()}" for one in engines if one["ok"]}
    assert {path.name for path in out.iterdir()} == built
    shown = planish("engine", nvidia, "--check", "--gpu", "8.6", cache=cache)
    assert shown.returncode == 1
    assert "refused: onnx/model_fp8.onnx" in shown.stdout
    text = " ".join(shown.stdout.split())
    assert f"onnx/model_fp8.onnx: {fp8['reason']}. {fp8['remedy']}" in text


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
    write_manifest(out, manifest)
    done = planish("engine", out, "--check", cache=cache)
    assert done.returncode == 1, done.stderr
    assert "refused: onnx/model.onnx" in done.stdout
    assert repr(node.name) in done.stdout.replace("\n", "")


@pytest.mark.slow
@NEEDS_RTX
def test_changed_weights_beside_a_graph_are_found(nvidia: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(nvidia, out)
    graph = out / "onnx" / "model.onnx"
    model = onnx.load(graph)
    onnx.save(model, graph, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    manifest = json.loads((out / "planish.json").read_text(encoding="utf-8"))
    names = ["onnx/model.onnx", "onnx/model.onnx_data"]
    for name in names:
        manifest["files"][name] = {"sha256": file_digest(out / name), "bytes": (out / name).stat().st_size}
    for entry in manifest["variants"]:
        entry["files"] = names if entry["files"][:1] == names[:1] else entry["files"]
    write_manifest(out, manifest)
    engines = tmp_path / "engines"
    assert planish("engine", out, "--out", engines, "--gpu", "SM89", cache=cache).returncode == 0
    sheet = json.loads((engines / "tensorrt-rtx-fp32-sm89" / "fingerprint.json").read_text(encoding="utf-8"))
    assert sheet["fingerprint"]["onnx"] == {Path(name).name: file_digest(out / name) for name in names}
    with (out / names[1]).open("r+b") as file:
        file.write(b"planted")
    done = planish("engine", out, "--check", cache=cache)
    assert done.returncode == 2
    assert names[1] in done.stderr


def write_manifest(bundle: Path, manifest: dict[str, Any]) -> None:
    manifest[DIGEST_KEY] = manifest_digest(manifest)
    (bundle / "planish.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.slow
@NEEDS_RTX
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_build_that_is_ended_leaves_nothing(nvidia: Path, cache: Path, tmp_path: Path, number: int) -> None:
    (tmp_path / "out").mkdir()
    command = [*COMMAND, "engine", str(nvidia), "--out", str(tmp_path / "out" / "engines")]
    env = {**environment(cache), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (found := list(tmp_path.glob(".planish-engine-*/request.json"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found, "it never began to build"
    process.send_signal(number)
    assert process.wait(60) in (128 + number, 130)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert list((tmp_path / "out").iterdir()) == []
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False)
    assert left.stdout.split() == []


def test_compute_capabilities_as_people_write_them() -> None:
    assert [capability(text) for text in ("SM89", "sm_89", "8.9", "12.0", "sm120")] == ["SM89"] * 3 + ["SM120"] * 2
    for text in ("", "Ada", "CURRENT", "SM", "8.9.1", "1234"):
        with pytest.raises(RequestError, match="not a compute capability"):
            capability(text)


@pytest.mark.slow
@NEEDS_RTX
def test_one_gpu_twice_is_built_for_once(nvidia: Path, cache: Path) -> None:
    done = planish("engine", nvidia, "--check", "--gpu", "8.9", "--gpu", "sm89", "--json", cache=cache)
    assert done.returncode == 0, done.stderr
    assert [engine["gpu"] for engine in json.loads(done.stdout)["engines"]] == ["SM89"] * 5


@pytest.mark.slow
@NEEDS_RTX
@pytest.mark.parametrize("out", ["/proc/none/engines", "/dev/null/engines", "x" * 300])
def test_a_folder_that_cannot_be_made(nvidia: Path, cache: Path, tmp_path: Path, out: str) -> None:
    done = planish("engine", nvidia, "--out", out, "--gpu", "SM89", cache=cache, cwd=tmp_path)
    assert done.returncode in (2, 3), done.stderr
    assert "bug" not in done.stderr


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
    assert len(document["engines"]) == 5
    trusted = {path.name for path in (cache / "engines").iterdir()}
    for told in document["engines"]:
        engine = Path(told["engine"])
        assert engine == out / f"{told['variant']}-sm89" / "model.plan"
        sheet = json.loads((engine.parent / "fingerprint.json").read_text(encoding="utf-8"))
        assert sheet["sha256"] == file_digest(engine)
        assert sheet["sha256"] in trusted
        assert sheet["fingerprint"]["gpus"] == ["8.9"]
        graph = nvidia / told["file"]
        assert sheet["fingerprint"]["onnx"][graph.name] == file_digest(graph)
    again = planish("engine", nvidia, "--out", out, cache=cache)
    assert again.returncode == 2
    assert "is there already" in again.stderr
