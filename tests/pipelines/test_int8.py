"""Int8 in the main job: what is made, that it ran on integers, and that only what is good enough is selected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calibration.table import load_table
from exporter.artifact import Variant
from exporter.sources import resolve_source
from exporter.targets import get_target
from pipelines.plan import candidates
from pipelines.quantizing import needs
from pipelines.recipe import Recipe
from pipelines.stages.check import as_asked
from tests.models import make_model
from tests.pipelines.jobs import export, manifest, planish, texts_file

Folders = Callable[..., Path]
DYNAMIC, STATIC = "onnxruntime-cpu-int8-dynamic", "openvino-cpu-int8-static-smooth"
PLAIN_STATIC = "openvino-cpu-int8-static"
WEIGHTS, INT4 = "onnxruntime-cpu-int8-weights", "onnxruntime-cpu-int4"
BOTH = ("targets=[onnxruntime-cpu, openvino-cpu]", "precisions=[fp32, int8]")
SAMPLES = "calibration.samples=24"
FEW = 2


def test_forms_of_the_recipe() -> None:
    def planned(**fields: object) -> set[str]:
        recipe = Recipe(source="a", targets=["onnxruntime-cpu", "openvino-cpu", "inductor-cpu"], **fields)
        return {c.variant.id for c in candidates(recipe, traceable=True) if c.variant.precision in ("int8", "int4")}

    usual = {DYNAMIC, STATIC, f"{STATIC}-bf16", f"{STATIC}-bf16-shaped", "inductor-cpu-int8-static-smooth"}
    assert planned() == usual
    assert planned(forms="all") == usual | {
        "onnxruntime-cpu-int8-dynamic-fused",
        "onnxruntime-cpu-int8-dynamic-smooth",
        WEIGHTS,
        PLAIN_STATIC,
        f"{PLAIN_STATIC}-bf16",
        f"{STATIC}-shaped",
        "inductor-cpu-int8-dynamic",
        "inductor-cpu-int8-static",
    }
    assert planned(precisions=["fp32"]) == set()
    assert planned(precisions=["fp32", "int4"]) == planned(precisions=["fp32", "int4"], forms="all") == {INT4}


@pytest.mark.parametrize(
    ("target", "form", "ingredient", "base"),
    [
        ("onnxruntime-cpu", "weights", "onnx-int8-weights", "onnx-fp32"),
        ("onnxruntime-cpu", "dynamic", "onnx-int8-dynamic", "onnx-fp32"),
        ("onnxruntime-cpu", "dynamic-fused", "onnx-int8-dynamic-fused", "onnx-fp32-fused"),
        ("onnxruntime-cpu", "dynamic-smooth", "onnx-int8-dynamic-smooth", "onnx-fp32"),
        ("openvino-cpu", "static", "onnx-int8-static-openvino", "onnx-fp32"),
        ("openvino-cpu", "static-bf16", "onnx-int8-static-openvino", "onnx-fp32"),
        ("openvino-cpu", "static-smooth", "onnx-int8-static-smooth-openvino", "onnx-fp32"),
        ("openvino-cpu", "static-smooth-bf16-shaped", "onnx-int8-static-smooth-openvino", "onnx-fp32"),
        ("tensorrt", "static-smooth", "onnx-int8-static-smooth-tensorrt", "onnx-fp32"),
        ("tensorrt-rtx", "static", "onnx-int8-static-tensorrt", "onnx-fp32"),
        ("inductor-cpu", "static", "pt2-int8-static", "pt2-fp32"),
        ("inductor-cpu", "static-smooth", "pt2-int8-static-smooth", "pt2-fp32"),
    ],
)
def test_what_a_form_is_made_from(target: str, form: str, ingredient: str, base: str) -> None:
    assert get_target(target).ingredient(Variant(target, "int8", form)) == ingredient
    assert needs(ingredient) == base
    assert needs(base) is None


def test_what_int4_is_made_from() -> None:
    assert get_target("onnxruntime-cpu").ingredient(Variant("onnxruntime-cpu", "int4")) == "onnx-int4"
    assert needs("onnx-int4") == "onnx-fp32"


def test_a_form_whose_runtime_ran_no_integers_fails() -> None:
    passed = {"verdict": "passed", "reason": "it is near"}
    for precision in ("int8", "int4"):
        assert as_asked(passed, {"precision": precision}, precision) == passed
        failed = as_asked(passed, {"precision": "fp32"}, precision)
        assert failed["verdict"] == "failed"
        assert f"asked for in {precision}" in failed["reason"]
    assert as_asked(passed, {"precision": "fp32"}, "fp32") == passed


def test_without_the_quantizer_the_form_is_skipped_and_engines_still_open(monkeypatch: pytest.MonkeyPatch) -> None:
    from exporter.targets import inductor

    found = inductor.installed_version
    monkeypatch.setattr(inductor, "installed_version", lambda *names: None if "torchao" in names else found(*names))
    target, variant = get_target("inductor-cpu"), Variant("inductor-cpu", "int8", "static")
    assert "torchao" in target.buildable(variant).reason
    assert target.availability(variant).available
    assert target.buildable(Variant("inductor-cpu", "fp32")).available


@pytest.fixture(scope="module")
def tables(cache: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with 1 MiB of its file in one embedding table, beside what is learned from, and its bundle with int8."""
    folder = tmp_path_factory.mktemp("tables")
    model = make_model("bert", folder / "bert", changes={"type_vocab_size": 8192})
    learned = texts_file(folder / "learn.jsonl", [f"This is sentence number {i}." for i in range(40)])
    asked = (*BOTH, SAMPLES, f"calibration.data={learned}")
    done = export(model, folder / "out", cache, *asked, options=["--data", texts])
    assert done.returncode == 0, done.stderr
    return model, folder / "out"


@pytest.mark.slow
def test_bundle_with_int8(tables: tuple[Path, Path], cache: Path) -> None:
    _, out = tables
    by_id = {entry["id"]: entry for entry in manifest(out)["variants"]}
    assert by_id[DYNAMIC]["files"] == ["onnx/model_int8.onnx"]
    assert by_id[STATIC]["files"] == [f"variants/{STATIC}/model_int8.onnx"]
    assert sum(by_id[DYNAMIC]["executed"]["integer_kernels"].values()) == 12
    assert by_id[DYNAMIC]["executed"]["precision"] == by_id[STATIC]["executed"]["precision"] == "int8"
    table = load_table(out / "evidence" / "calibration.json")
    assert (table.samples, table.origin) == (24, "learn.jsonl")
    precision = json.loads((out / "evidence" / "precision.json").read_text(encoding="utf-8"))
    opened_alike = {f"{STATIC}-bf16", f"{STATIC}-bf16-shaped"} & set(by_id)
    assert {by_id[name]["files"][0] for name in opened_alike} == {f"variants/{STATIC}/model_int8.onnx"}
    assert set(precision) == {"onnx/model_int8.onnx", STATIC, *opened_alike}
    seen = {tensor for entry in precision[STATIC]["quantized"] for tensor in entry["activations"]}
    divided = {name for name in seen if name not in table.tensors}  # by an operator: tensors of the smoothed graph
    assert len(divided) == precision[STATIC]["smoothing"]["inserted"]
    assert seen - divided < set(table.tensors)  # which has what other schemes need too
    assert manifest(out)["recipe"]["calibration"]["data"] == "learn.jsonl"
    verified = planish("verify", out, "--no-latency", cache=cache)
    assert verified.returncode == 0, verified.stdout


@pytest.mark.slow
def test_bundle_with_weights_alone_quantized(model_folder: Folders, cache: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ("precisions=[fp32, int8, int4]", "forms=all", "calibration.search=false", "calibration.samples=8")
    done = export(model_folder("bert"), out, cache, *asked, options=["--data", texts])
    assert done.returncode == 0, done.stderr
    by_id = {entry["id"]: entry for entry in manifest(out)["variants"]}
    precision = json.loads((out / "evidence" / "precision.json").read_text(encoding="utf-8"))
    for name, ran, bits in ((WEIGHTS, "int8", 8), (INT4, "int4", 4)):
        assert by_id[name]["files"] == [f"variants/{name}/model_{ran}.onnx"]
        assert by_id[name]["executed"]["precision"] == ran
        assert by_id[name]["executed"]["integer_weights"] == {f"MatMulNBits, {bits} bits": 12}
        assert by_id[name]["executed"]["integer_kernels"] == {}
        assert by_id[name]["gates"]["parity"]["verdict"] == "passed"
        told = precision[name]
        assert (told["precision"], told["form"], told["bits"], told["block_size"]) == (ran, "weights", bits, 32)
        assert len(told["quantized"]) == 12
    assert by_id[WEIGHTS]["status"] == "passed"
    assert not by_id[DYNAMIC]["executed"]["integer_weights"]
    size = {name: (out / by_id[name]["files"][0]).stat().st_size for name in ("onnxruntime-cpu-fp32", WEIGHTS, INT4)}
    assert size[INT4] < size[WEIGHTS] < size["onnxruntime-cpu-fp32"]
    verified = planish("verify", out, "--no-latency", cache=cache)
    assert verified.returncode == 0, verified.stdout


def on_samples(evidence: dict[str, Any]) -> float:
    """RMS relative error on real samples, as parity found it."""
    found = [e for c in evidence["cases"] if c["name"].startswith("samples") for e in c["rms_relative"].values()]
    return sum(found) / len(found)


def first_layers(source: str, made: Path, layers: int) -> Path:
    """The first layers of a real BERT: their activations are uneven as they are, in a part of the time."""
    from safetensors.torch import load_file, save_file

    folder = resolve_source(source).path
    shutil.copytree(folder, made)
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    (made / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}), encoding="utf-8")
    dropped = tuple(f"encoder.layer.{layer}." for layer in range(layers, config["num_hidden_layers"]))
    weights = load_file(made / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.removeprefix("bert.").startswith(dropped)}
    save_file(kept, made / "model.safetensors", metadata={"format": "pt"})
    return made


@pytest.mark.slow
def test_smoothed_forms(minilm: str, cache: Path, texts: Path, tmp_path: Path) -> None:
    """They run on integers, say what was smoothed, and are nearer to the original than the plain forms."""
    out = tmp_path / "out"
    few = first_layers(minilm, tmp_path / "minilm", FEW)
    asked = (BOTH[0], "precisions=[int8]", "forms=all", "calibration.samples=64", "calibration.search=false")
    done = export(few, out, cache, *asked, options=["--data", texts])
    assert done.returncode == 0, done.stderr
    by_id = {entry["id"]: entry for entry in manifest(out)["variants"]}
    precision = json.loads((out / "evidence" / "precision.json").read_text(encoding="utf-8"))
    parity = json.loads((out / "evidence" / "parity.json").read_text(encoding="utf-8"))
    table = load_table(out / "evidence" / "calibration.json")
    for plain in (DYNAMIC, PLAIN_STATIC):
        smooth = f"{plain}-smooth"
        assert by_id[smooth]["files"] == [f"variants/{smooth}/model_int8.onnx"]
        assert by_id[smooth]["executed"]["precision"] == "int8"
        told = precision[smooth]["smoothing"]
        assert told["rms_relative"] < 1e-6
        assert 0 < told["inserted"] <= len(told["groups"])
        assert {entry["activation"] for group in told["groups"] for entry in group["activations"]} <= set(table.tensors)
        assert on_samples(parity[smooth]) < 0.8 * on_samples(parity[plain])
    assert sum(by_id[f"{DYNAMIC}-smooth"]["executed"]["integer_kernels"].values()) == 6 * FEW
    # The ranges are those of the smoothed graph, whose tensors have names of their own where an operator came.
    seen = {tensor for entry in precision[STATIC]["quantized"] for tensor in entry["activations"]}
    assert seen - set(table.tensors)


@pytest.mark.slow
def test_embedding_tables_in_int8(tables: tuple[Path, Path], cache: Path, texts: Path, tmp_path: Path) -> None:
    """A quarter of the bytes in every form that reads them, unless the recipe says no; and int8 is still what runs."""
    model, with_tables = tables
    out = tmp_path / "out"
    # Random weights have no quality to lose; the same stages would come from the cache if the key were no input.
    more = (SAMPLES, f"calibration.data={model.parent / 'learn.jsonl'}", "calibration.tables=false")
    done = export(model, out, cache, BOTH[0], "precisions=[int8]", *more, options=["--data", texts])
    assert done.returncode == 0, done.stderr
    found: dict[bool, dict[str, Any]] = {True: {}, False: {}}
    for asked, folder in ((True, with_tables), (False, out)):
        written = manifest(folder)
        evidence = {
            name: json.loads((folder / "evidence" / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("precision", "parity")
        }
        by_id = {entry["id"]: entry for entry in written["variants"]}
        for variant, key in ((DYNAMIC, "onnx/model_int8.onnx"), (STATIC, STATIC)):
            assert by_id[variant]["executed"]["precision"] == "int8"
            assert by_id[variant]["gates"]["parity"]["verdict"] == "passed"
            told = evidence["precision"][key]["tables"]
            size = written["files"][by_id[variant]["files"][0]]["bytes"]
            found[asked][variant] = (told, size, on_samples(evidence["parity"][variant]))
    for variant in (DYNAMIC, STATIC):
        (told, small, near), (none, large, plain) = found[True][variant], found[False][variant]
        assert none == []
        assert [(entry["rows"], entry["columns"]) for entry in told] == [(8192, 32)]
        assert 0 < told[0]["rms_relative"] < 0.01
        saved = told[0]["bytes_before"] - told[0]["bytes_after"]
        assert saved * 0.98 < large - small < saved
        assert plain != near < plain + told[0]["rms_relative"]
        assert "embedding table in int8" in (with_tables / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_few_labelled_rows_do_not_prove_int8_good(
    model_folder: Folders, cache: Path, labelled_texts: Path, tmp_path: Path
) -> None:
    """Thirty-six rows cannot rule out a loss of a point: int8 is inconclusive, and FP32 is selected."""
    out = tmp_path / "out"
    done = export(model_folder("bert-classifier"), out, cache, *BOTH, options=["--data", labelled_texts])
    assert done.returncode == 0, done.stderr
    written = manifest(out)
    status = {entry["id"]: entry["status"] for entry in written["variants"]}
    assert status[DYNAMIC] in ("inconclusive", "failed")
    assert status[STATIC] in ("inconclusive", "failed")
    assert status["onnxruntime-cpu-fp32"] == "passed"
    assert not {DYNAMIC, STATIC} & set(written["selected"].values())


@pytest.mark.slow
def test_a_form_that_cannot_be_made_stops_nothing(cache: Path, tmp_path: Path) -> None:
    """The only product with a weight is a `Gemm` here, which has no dynamic form."""
    out = tmp_path / "out"
    done = export("tests.models:conv_factory", out, cache, *BOTH, 'latency.points=["1"]')
    assert done.returncode == 0, done.stderr
    by_id = {entry["id"]: entry for entry in manifest(out)["variants"]}
    assert by_id[DYNAMIC]["status"] == "skipped"
    assert "nothing in the graph can be quantized" in by_id[DYNAMIC]["reason"]
    assert by_id[STATIC]["executed"]["precision"] == "int8"
