from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from exporter import hardware
from exporter.errors import RequestError
from pipelines.compress.sections import Compress
from pipelines.recipe import TARGETS, Recipe, load_recipe, parse_overrides, parse_point, recipe_digest, usable_cores
from pipelines.recipe_sections import Calibration


def write(folder: Path, text: str | bytes, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        Recipe(**fields)
    return caught.value


def test_where_a_recipe_compresses_it_calibrates_on_what_it_trains_on(tmp_path: Path) -> None:
    for name in ("train.csv", "texts.txt", "mine.csv"):
        (tmp_path / name).write_text("text,label\nsome words,1\n", encoding="utf-8")
    steps = "steps: [{prune: {heads: 0.5}}]"

    def calibrated(section: str, more: str = "") -> Any:
        return load_recipe(write(tmp_path, f"source: model\ncompress:\n  {section}\n{more}")).calibration

    train = str(tmp_path / "train.csv")
    assert calibrated(f"data: train.csv\n  columns: {{text: text}}\n  {steps}").data == train
    assert calibrated(f"data: train.csv\n  columns: {{text: text}}\n  {steps}").columns == {"text": "text"}
    assert calibrated(f"data: train.csv\n  split: train\n  {steps}").split == "train"
    assert calibrated(f"data: train.csv\n  {steps}", "calibration: {samples: 7}").samples == 7
    assert calibrated(f"unlabelled: texts.txt\n  {steps}").data == str(tmp_path / "texts.txt")
    assert calibrated(f"data: train.csv\n  {steps}", "calibration: {data: mine.csv}").data == str(tmp_path / "mine.csv")
    assert calibrated(f"data: train.csv\n  {steps}", "calibration: {data: null}").data is None
    assert calibrated("data: train.csv\n  steps: []").data is None
    given = {"data": train, "columns": {"text": "text"}, "steps": [{"prune": {"heads": 0.5}}]}
    for section in (given, Compress(**given)):
        learned = Recipe(source="model", compress=section, calibration=Calibration(samples=7)).calibration
        assert (learned.data, learned.columns, learned.samples) == (train, {"text": "text"}, 7)
    assert "calibration" not in str(refused(source="model", compress={**given, "columns": ["text"]}))


def test_calibration_reads_the_columns_of_inputs_alone(tmp_path: Path) -> None:
    from pipelines.runner import _calibration_columns

    for name in ("texts.csv", "test.csv"):
        (tmp_path / name).write_text("sentence,label\nsome words,1\n", encoding="utf-8")
    columns = "columns: {text: sentence, label: label}"
    recipe = load_recipe(
        write(
            tmp_path,
            "source: model\ncompress: {unlabelled: texts.csv, steps: [{prune: {heads: 0.5}}]}\n"
            f"data: {{evaluation: test.csv, {columns}}}",
        )
    )
    assert _calibration_columns(recipe) == {"text": "sentence"}
    assert _calibration_columns(load_recipe(write(tmp_path, "source: model"))) == {}


def test_defaults() -> None:
    recipe = Recipe(source="package:folder")
    assert recipe.targets == TARGETS
    assert recipe.precisions == ("fp32", "fp16", "bf16", "int8")
    assert recipe.require == ("onnxruntime-cpu-fp32",)
    assert (recipe.export.opset, recipe.parity.samples, recipe.latency.budget_s) == (20, 32, 75)
    assert recipe.contract.attends
    assert not recipe.trust
    assert not recipe.trust_remote_code
    # Defaults are not validated by pydantic; they must be what a user could write.
    assert Recipe(**recipe.model_dump()) == recipe


def test_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe(source="a:b").seed = 1  # type: ignore[misc]


def test_import_needs_no_model_library() -> None:
    heavy = "('torch', 'transformers', 'onnx', 'rich')"
    code = f"import sys, pipelines.recipe; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize(
    ("fields", "key", "value", "remedy"),
    [
        ({}, "'source'", "nothing given", "Give it a value"),
        ({"source": ""}, "'source'", "''", "Give"),
        ({"source": "a", "taks": "x"}, "'taks'", "'x'", "Did you mean 'task'?"),
        ({"source": "a", "latency": {"budgt_s": 1}}, "'latency.budgt_s'", "1", "Did you mean 'latency.budget_s'?"),
        ({"source": "a", "budget_s": 1}, "'budget_s'", "1", "Did you mean 'latency.budget_s'?"),
        ({"source": "a", "zzz": 1}, "'zzz'", "1", "Known keys: source, task"),
        ({"source": "a", "latency": 3}, "'latency'", "3", "a mapping"),
        ({"source": "a", "latency": {"budget_s": -1}}, "'latency.budget_s'", "-1", "greater than 0"),
        ({"source": "a", "latency": {"budget_s": float("nan")}}, "'latency.budget_s'", "nan", "finite"),
        ({"source": "a", "latency": {"min_speedup": 1, "baselines": []}}, "'latency.min_speedup'", "1", "Add eager"),
        ({"source": "a", "latency": {"budget_s": "10"}}, "'latency.budget_s'", "'10'", "a number"),
        ({"source": "a", "latency": {"points": ["1y2"]}}, "'latency.points'", "1y2", "8x128"),
        ({"source": "a", "latency": {"points": ["0x16"]}}, "'latency.points'", "0x16", "8x128"),
        ({"source": "a", "latency": {"points": ["1x16", "1x16"]}}, "'latency.points'", "1x16", "Keep one"),
        ({"source": "a", "latency": {"baselines": ["jit"]}}, "'latency.baselines.0'", "jit", "eager or compile"),
        ({"source": "a", "export": {"opset": 23}}, "'export.opset'", "23", "at most 22"),
        ({"source": "a", "export": {"opset": 17}}, "'export.opset'", "17", "at least 18"),
        ({"source": "a", "seed": True}, "'seed'", "True", "a whole number"),
        ({"source": "a", "trust": "yes"}, "'trust'", "yes", "true or false"),
        ({"source": "a", "name": 2024}, "'name'", "2024", "quote it"),
        ({"source": "a", "name": "../x"}, "'name'", "../x", "must match"),
        ({"source": "a", "targets": "onnxruntime-cpu"}, "'targets'", "onnxruntime-cpu", "a list"),
        ({"source": "a", "targets": []}, "'targets'", "[]", "Give at least one"),
        ({"source": "a", "targets": ["onnxrutime-cpu"]}, "'targets'", "onnxrutime-cpu", "mean 'onnxruntime-cpu'?"),
        ({"source": "a", "precisions": ["mixed"]}, "'precisions'", "mixed", "fp32, fp16, bf16"),
        ({"source": "a", "keep": "best"}, "'keep'", "best", "all or selected"),
        ({"source": "a", "require": ["onnxruntime-cpu-int4"]}, "'require'", "onnxruntime-cpu-int4", "precisions"),
        ({"source": "a", "threads": 0}, "'threads'", "0", "at least 1"),
        ({"source": "a", "quality": {"max_drop": 2.0, "max_drop_worst": 1}}, "'quality.max_drop_worst'", "1", "2.0"),
        ({"source": "a", "data": {"columns": {"text": "t"}}}, "'data.columns'", "'t'", "data.evaluation"),
        ({"source": "a", "data": {"split": "test"}}, "'data.split'", "test", "data.evaluation"),
        ({"source": "a", "calibration": {"columns": {"text": "t"}}}, "calibration.columns", "'t'", "calibration.data"),
        ({"source": "a", "calibration": {"smooth_alpha": 0}}, "'calibration.smooth_alpha'", "0", "greater than 0"),
        ({"source": "a", "calibration": {"smooth_alpha": 1.0}}, "'calibration.smooth_alpha'", "1.0", "less than 1"),
        ({"source": "a", "calibration": {"smooth_alpha": True}}, "'calibration.smooth_alpha'", "True", "a number"),
        ({"source": "a", "data": {"columns": {"text": -3}}}, "'data.columns.text'", "-3", "quote it"),
        ({"source": "a", "task": "fill-mask", "custom": {"inputs": {"x": {"dtype": "int64", "shape": [1]}},
          "outputs": ["y"]}}, "'task'", "fill-mask", "task: custom"),
    ],
)  # fmt: skip
def test_error_names_key_value_and_remedy(fields: dict[str, Any], key: str, value: str, remedy: str) -> None:
    error = refused(**fields)
    assert key in error.what
    assert value in str(error.value)
    assert remedy in str(error.remedy)
    assert error.exit_status == 2


def test_all_out_of_range_values_are_named() -> None:
    text = str(refused(source="a", latency={"budget_s": -1}, parity={"samples": 0}, export={"opset": 99}))
    assert "3 errors" in text
    for part in ("latency.budget_s", "-1", "parity.samples", "(0)", "export.opset", "99", "at most 22"):
        assert part in text


def test_default_requirement_applies_only_where_it_is_asked_for() -> None:
    assert Recipe(source="a", targets=["openvino-cpu"]).require == ()
    assert Recipe(source="a", precisions=["fp16"]).require == ()
    assert Recipe(source="a", precisions=["fp32"]).require == ("onnxruntime-cpu-fp32",)
    refused(source="a", targets=["openvino-cpu"], require=["onnxruntime-cpu-fp32"])
    assert Recipe(source="a", require=["onnxruntime-cpu-fp32-fused"]).require == ("onnxruntime-cpu-fp32-fused",)


CUSTOM: dict[str, Any] = {
    "inputs": {"x": {"dtype": "float32", "shape": ["batch", 3, "width"]}},
    "outputs": ["y"],
    "axes": {"batch": {"max": 8}, "width": {"min": 16, "max": 64}},
}


def test_custom_signature() -> None:
    custom = Recipe(source="m:f", custom=CUSTOM).custom
    assert custom is not None
    assert custom.inputs["x"].shape == ("batch", 3, "width")
    assert (custom.axes["batch"].min, custom.axes["width"].max) == (1, 64)


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ({"axes": {"batch": {"max": 8}}}, "'custom.axes'", "width"),
        ({"axes": {**CUSTOM["axes"], "depth": {"max": 2}}}, "'custom.axes'", "depth"),
        ({"axes": {**CUSTOM["axes"], "width": {"min": 9, "max": 2}}}, "'custom.axes.width.min'", "9"),
        ({"inputs": {"x": {"dtype": "float", "shape": [1]}}, "axes": {}}, "'custom.inputs.x.dtype'", "float"),
        ({"inputs": {"x": {"dtype": "int8", "shape": [-1]}}, "axes": {}}, "'custom.inputs.x.shape'", "-1"),
        ({"inputs": {"x": {"dtype": "int8", "shape": [True]}}, "axes": {}}, "'custom.inputs.x.shape'", "True"),
        ({"inputs": {}, "axes": {}}, "'custom.inputs'", "{}"),
        ({"outputs": []}, "'custom.outputs'", "[]"),
    ],
)
def test_custom_errors(change: dict[str, Any], key: str, value: str) -> None:
    error = refused(source="m:f", custom={**CUSTOM, **change})
    assert key in error.what
    assert value in str(error.value)


def test_load_reads_yaml_and_lays_overrides_over_it(tmp_path: Path) -> None:
    path = write(
        tmp_path, "source: package:folder\nlatency: {points: [1x16], budget_s: 5}\nseed: 3\ndata: {evaluation: a.csv}\n"
    )
    recipe = load_recipe(
        path, ["latency.budget_s=10", "data.columns.text=sentence", "precisions=[fp32]", "keep=selected"]
    )
    assert recipe.latency.points == ("1x16",)
    assert (recipe.latency.budget_s, recipe.seed, recipe.keep) == (10, 3, "selected")
    assert recipe.data.columns == {"text": "sentence"}
    assert recipe.precisions == ("fp32",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "is empty"),
        (b"- a\n- b\n", "not a mapping"),
        (b"source: a\nsource: b\n", "given twice: 'source' in line 2"),
        (b"source: a\nlatency: {budget_s: 1, budget_s: 2}\n", "given twice: 'budget_s' in line 2"),
        (b"source: a\nlatency: [1\n", "not valid YAML"),
        (b"source: \xff\xfe\n", "not UTF-8"),
        (b"source: a\n1: b\n", "not text: 1"),
        (b"source: !!python/object/apply:os.system ['false']\n", "not valid YAML"),
        (b"source: a\nname: 2024-13-45\n", "not valid YAML"),
        (b"source: a\nname: 2024-01-02\n", "must be text"),
        (b"source: a\ndata: &d\n  columns: *d\n", "contains itself"),
        (b"source: a\nname: " + b"[" * 100_000, "nested too deeply"),
        (b"source: a\n#" + b" " * (1 << 20), "too large"),
        (b"source: a\nname: \x00\n", "not valid YAML"),
    ],
)
def test_unreadable_recipe(tmp_path: Path, text: bytes, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        load_recipe(write(tmp_path, text))
    assert says in str(caught.value)


def test_missing_recipe_and_folder_as_recipe(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no such file.*nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(RequestError, match="a folder"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("items", "says"),
    [
        (["latency.budget_s"], "not key=value"),
        (["=3"], "not key=value"),
        (["latency..x=3"], "not key=value"),
        (["seed=[1"], "not valid YAML"),
        (["latency=1", "latency.budget_s=2"], "a value as a section"),
    ],
)
def test_bad_overrides(items: list[str], says: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_overrides(items)
    assert says in str(caught.value)


def test_overrides_parse() -> None:
    assert parse_overrides(["a.b=1", "a.c=[x, 2]", "d=k=v", "a.b=null", "e="]) == {
        "a": {"b": None, "c": ["x", 2]},
        "d": "k=v",
        "e": None,
    }


def test_items_of_a_list_are_overridden_by_their_number(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "source: m\ntask: text-classification\n"
        "compress: {data: t.csv, steps: [finetune, {distil: {layers: 2, epochs: 3}}]}\n",
    )
    recipe = load_recipe(path, ["compress.steps.0.finetune.epochs=5", "compress.steps.1.distil.layers=1"])
    first, second = recipe.compress.steps
    assert (first.finetune.epochs, second.distil.layers, second.distil.epochs) == (5, 1, 3)
    with pytest.raises(RequestError, match=r"compress.steps.*must be a list"):
        load_recipe(path, ["compress.steps.2.finetune.epochs=5"])


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    (here / "model").mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    path = write(here, "source: model\ndata: {evaluation: data/test.csv}\n")
    recipe = load_recipe(path)
    assert recipe.source == str(here / "model")
    assert recipe.data.evaluation == str(here / "data/test.csv")
    assert load_recipe(path, ["data.evaluation=own.csv"]).data.evaluation == str(elsewhere / "own.csv")
    # A hub id or a package looks like a path and is none, unless it is there.
    for source in ("org/model", "package:folder", "module:factory"):
        assert load_recipe(write(here, f"source: {source}\n")).source == source
    for source in ("./gone", "gone/model.onnx"):
        assert load_recipe(write(here, f"source: {source}\n")).source == os.path.normpath(here / source)
    assert Recipe.from_source("./x", overrides=["seed=4"]).source == str(elsewhere / "x")


def test_resolved_fills_in_everything(tmp_path: Path) -> None:
    data = tmp_path / "test.csv"
    data.write_text("text\nhello\n")
    recipe = Recipe(source=str(tmp_path), data={"evaluation": str(data)}, quality={"max_drop": 1})
    resolved = recipe.resolved()
    json.dumps(resolved, allow_nan=False)
    assert resolved["threads"] == usable_cores() <= len(os.sched_getaffinity(0))
    assert resolved["quality"]["max_drop_worst"] == 2
    assert resolved["data"]["evaluation"] == "test.csv"
    assert resolved["source"] == tmp_path.name
    assert str(tmp_path) not in json.dumps(resolved)
    # What a bundle records can be run again.
    assert Recipe(**resolved).latency == recipe.latency


def test_digest_says_what_is_asked_not_where_it_lies(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.csv").write_text("text\nhello\n")

    def recipe(folder: str, **fields: Any) -> Recipe:
        path = tmp_path / folder
        return Recipe(source=str(path), data={"evaluation": str(path / f"{folder}.csv")}, **fields)

    assert recipe("a").digest() == recipe("b").digest() == recipe_digest(recipe("a").resolved())
    assert recipe("a").digest() != recipe("a", seed=1).digest()
    before = recipe("a").digest()
    (tmp_path / "a/a.csv").write_text("text\nworld\n")
    assert recipe("a").digest() != before


def test_the_same_bytes_read_as_another_format_are_other_data(tmp_path: Path) -> None:
    found = {}
    for suffix in ("csv", "txt", "CSV"):
        path = tmp_path / f"rows.{suffix}"
        path.write_text("text\nhello\n")
        found[suffix] = Recipe(source="a:b", data={"evaluation": str(path)}).digest()
    assert found["csv"] != found["txt"]
    assert found["csv"] == found["CSV"]


def test_evaluation_data_must_exist_and_have_the_stated_digest(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no such file or folder.*gone\.csv"):
        Recipe(source="a", data={"evaluation": str(tmp_path / "gone.csv")}).resolved()
    (tmp_path / "x.csv").write_text("text\n")
    with pytest.raises(RequestError, match=r"data\.sha256.*another digest"):
        Recipe(source="a", data={"evaluation": str(tmp_path / "x.csv"), "sha256": "0" * 64}).resolved()


def test_a_changed_picture_is_other_data(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "rows.csv").write_text("image\nred.png\n")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    recipe = Recipe(source="m", task="image-classification", data={"evaluation": str(tmp_path / "rows.csv")})
    before = recipe.digest()
    assert recipe.digest() == before
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "red.png")
    assert recipe.digest() != before


def test_columns_by_position_are_numbers_or_their_digits() -> None:
    recipe = Recipe(source="m", data={"evaluation": "a.csv", "columns": {"text": 0, "label": 3}})
    assert recipe == Recipe(source="m", data={"evaluation": "a.csv", "columns": {"text": "0", "label": "3"}})
    with pytest.raises(RequestError, match="columns"):
        Recipe(source="m", data={"columns": {"text": -1}})
    with pytest.raises(RequestError, match="columns"):
        Recipe(source="m", data={"columns": {"text": True}})


def test_points() -> None:
    assert parse_point("8x128") == (8, 128)
    assert parse_point("8") == (8, None)
    for wrong in ("", "x", "1x", "-1x3", "01x3", "1x2x3", "1 x 2"):
        with pytest.raises(ValueError):
            parse_point(wrong)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_threads_keep_to_what_a_container_allows(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    """Eight processors and a container are played by what the system would say."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(hardware, "_read", lambda path: files.get(path.removeprefix("/sys/fs/cgroup/"), ""))
    assert usable_cores() == cores
