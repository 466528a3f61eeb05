"""Bad input, as a user gives it to `planish export`: a readable error, the right exit status, nothing half-written."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from exporter.artifact import PRECISIONS
from exporter.errors import RequestError
from exporter.targets import get_target, targets
from pipelines.cli import run_command
from pipelines.plan import refuse_unoffered
from pipelines.recipe import Recipe
from tests.models import make_model
from tests.pipelines.jobs import ENCODER, digests, settings, texts_file

Folders = Callable[..., Path]
Refused = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def cache_root(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PLANISH_CACHE", str(root))
    return root


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def folder(model_folder: Folders, tmp_path: Path) -> Path:
    """A tiny sentence encoder to break."""
    return Path(shutil.copytree(model_folder("bert"), tmp_path / "model"))


@pytest.fixture
def refused(work: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """``refused(*arguments)``: the error of a command that must end with `status` and leave nothing in `work`."""

    def call(*arguments: str | Path, status: int = 2) -> dict[str, Any]:
        before = digests(work)
        capsys.readouterr()
        found = run_command([*map(str, arguments), "--json"])
        captured = capsys.readouterr()
        assert found == status, captured.out + captured.err
        assert "Traceback" not in captured.err
        error: dict[str, Any] = json.loads(captured.out)["error"]
        assert error["exit"] == status
        assert error["what"]
        assert error["remedy"], error
        assert digests(work) == before, "something was half-written"
        assert not (work / "bundles").exists()
        return error

    return call


def everything(error: dict[str, Any]) -> str:
    return " | ".join(str(error[key]) for key in ("what", "value", "remedy"))


# Sources


def test_a_missing_folder(refused: Refused, tmp_path: Path) -> None:
    assert "nowhere" in everything(refused("export", tmp_path / "nowhere"))


def test_an_empty_folder(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty" in everything(refused("export", tmp_path / "empty"))


def test_a_folder_without_weights(refused: Refused, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    error = refused("export", folder)
    assert "weights" in error["what"]
    assert str(folder) in error["value"]


class _Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("executed",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_holds_more_than_tensors(
    refused: Refused, folder: Path, capsys: pytest.CaptureFixture[str], zipped: bool
) -> None:
    (folder / "model.safetensors").unlink()
    content = {"a": _Evil()}
    if zipped:
        import torch

        torch.save(content, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    error = refused("export", folder)
    assert "pytorch_model.bin" in everything(error)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_safetensors(refused: Refused, folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    assert "model.safetensors" in everything(refused("export", folder))


def test_corrupt_safetensors(refused: Refused, folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"\xff" * 40 + content[48:])
    assert "model.safetensors" in everything(refused("export", folder))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_config_of_an_unknown_model_type(refused: Refused, folder: Path) -> None:
    edit(folder / "config.json", model_type="bertt")
    error = refused("export", folder)
    assert "bertt" in everything(error)


def test_a_config_that_is_not_json(refused: Refused, folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')
    assert "config.json" in everything(refused("export", folder))


@pytest.mark.slow
def test_a_config_that_does_not_fit_the_weights(refused: Refused, folder: Path) -> None:
    edit(folder / "config.json", hidden_size=48)
    error = refused("export", folder, *settings())
    assert "weights" in everything(error) or "shape" in everything(error)


@pytest.mark.slow
def test_weights_that_lack_a_tensor(refused: Refused, folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=4)
    assert "encoder.layer." in everything(refused("export", folder, *settings()))


@pytest.mark.slow
def test_a_folder_without_a_tokenizer(refused: Refused, folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "tokenizer" in everything(refused("export", folder, *settings()))


@pytest.mark.slow
def test_a_task_that_does_not_fit_the_architecture(refused: Refused, folder: Path) -> None:
    error = refused("export", folder, "--task", "image-classification", *settings())
    assert "image-classification" in everything(error)


@pytest.mark.slow
def test_a_task_whose_head_the_weights_lack(refused: Refused, folder: Path) -> None:
    error = refused("export", folder, "--task", "text-classification", *settings())
    assert "text-classification" in everything(error) or "classifier" in everything(error)


def test_an_unknown_task(refused: Refused, folder: Path) -> None:
    error = refused("export", folder, "--task", "text-clasification")
    assert "text-classification" in error["remedy"]


def test_an_ambiguous_task(refused: Refused, folder: Path) -> None:
    (folder / "modules.json").unlink()
    edit(folder / "config.json", architectures=None)
    error = refused("export", folder)
    assert "fill-mask" in everything(error)


def test_a_truncated_onnx_file(refused: Refused, tmp_path: Path) -> None:
    content = onnx_file(tmp_path).read_bytes()
    for keep in (0, 10, len(content) // 2):
        (tmp_path / "net.onnx").write_bytes(content[:keep])
        assert "net.onnx" in everything(refused("export", tmp_path / "net.onnx"))


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/passwd"])
def test_an_onnx_file_with_data_outside_its_folder(refused: Refused, tmp_path: Path, location: str) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside.bin").write_bytes(b"\0" * 64)
    path = onnx_file(tmp_path / "inside", location)
    assert location in everything(refused("export", path))


def onnx_file(folder: Path, location: str = "net.bin") -> Path:
    """A model of one matrix in external data at `location`."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    (folder / "net.bin").write_bytes(weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "64"}.items():
        weight.external_data.add(key=key, value=value)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "net", [x], [y], [weight])
    path = folder / "net.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString())
    assert onnx.load(path, load_external_data=False).graph.name == "net"
    return path


FACTORIES = """
import torch
def raises(): raise ValueError("the checkpoint of step 7 is gone")
def quits(): raise SystemExit(0)
def nothing(): return None
def broken():
    class Broken(torch.nn.Module):
        def forward(self, x): raise RuntimeError("dimensions of step 8 do not fit")
    return Broken(), {"x": torch.zeros(2, 2)}
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module of factories that go wrong."""
    (tmp_path / "modules").mkdir()
    name = f"factories_{tmp_path.name.replace('-', '_')}"
    (tmp_path / "modules" / f"{name}.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return name


@pytest.mark.parametrize(
    ("function", "told"), [("raises", "step 7"), ("quits", "SystemExit"), ("nothing", ""), ("absent", "absent")]
)
def test_a_factory_that_goes_wrong(refused: Refused, factories: str, function: str, told: str) -> None:
    error = refused("export", f"{factories}:{function}", *settings())
    assert told in everything(error)
    assert factories in everything(error)


@pytest.mark.slow
def test_a_module_that_cannot_run(refused: Refused, factories: str) -> None:
    assert "step 8" in everything(refused("export", f"{factories}:broken", *settings()))


def test_a_program_needs_trust_and_must_be_one(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "net.pt2").write_bytes(b"PK\x03\x04 not really")
    assert "--trust" in everything(refused("export", tmp_path / "net.pt2"))
    assert "net.pt2" in everything(refused("export", tmp_path / "net.pt2", "--trust", *settings()))


# Recipes


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("latncy.budget_s=3.0", "latency"),
        ("latency.point=[1x8]", "points"),
        ("latency.budget_s=-1.0", "budget_s"),
        ("latency.points=[8x0]", "8x0"),
        ("latency.points=[]", "points"),
        ("export.opset=7", "opset"),
        ("quality.max_drop=-0.1", "max_drop"),
        ("parity.samples=0", "samples"),
        ("seed=-1", "seed"),
        ("threads=0", "threads"),
        ("targets=[onnxruntime-cpuu]", "onnxruntime-cpu"),
        ("precisions=[fp33]", "fp32"),
        ("require=[tensorrt-int4-nothing]", "require"),
        ("latency.budget_s=soon", "budget_s"),
        ("name=../../up", "name"),
        (f"name={'n' * 201}", "200 characters"),
        ("keep=some", "selected"),
        ("quality.metric=speerman", "spearman"),
        ("quality.metric=exact-match", "does not fit the task feature-extraction"),
        ("nonsense", "nonsense"),
    ],
)
def test_settings_that_are_wrong(refused: Refused, folder: Path, setting: str, told: str) -> None:
    assert told in everything(refused("export", folder, "--set", setting))


def test_a_precision_that_no_target_of_the_recipe_offers(refused: Refused, tmp_path: Path, cache_root: Path) -> None:
    """Also beside one that they offer, and before the source is looked at: there is none."""
    offered = get_target("onnxruntime-cpu").precisions
    strange = next(precision for precision in PRECISIONS if precision not in offered)
    others = [name for name, target in targets().items() if strange in target.precisions]
    for asked in (strange, f"fp32, {strange}"):
        chosen = ["--set", "targets=[onnxruntime-cpu]", "--set", f"precisions=[{asked}]"]
        error = refused("export", tmp_path / "nowhere", *chosen)
        assert error["value"] == strange
        known = ", ".join(p for p in PRECISIONS if p in offered)
        assert error["remedy"] == f"They offer {known}; add a target that offers it: {', '.join(others)}"
    assert list(cache_root.iterdir()) == [], "work began"
    error = refused("export", tmp_path / "nowhere", "--set", "targets=[openvino-cpu]", "--set", "precisions=[fp16]")
    assert "tensorrt" in error["remedy"]


def test_default_precisions_need_not_all_be_offered() -> None:
    refuse_unoffered(Recipe(source="x", targets=["openvino-cpu"]))
    with pytest.raises(RequestError, match="offers a precision"):
        refuse_unoffered(Recipe(source="x", targets=["openvino-cpu"], precisions=["fp32", "fp16"]))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sorce: model", "source"),
        ("source: model\nlatency: {pionts: [1x8]}", "points"),
        ("source: [unclosed", "recipe.yaml"),
        ("- a\n- list", "recipe.yaml"),
        ("", "recipe.yaml"),
        ("source: model\nquality: {max_drop: 9e999}", "max_drop"),
        ("task: fill-mask", "source"),
    ],
)
def test_recipes_that_are_wrong(refused: Refused, tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert told in everything(refused("run", tmp_path / "recipe.yaml"))


def test_a_recipe_that_is_no_text(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00source")
    assert "recipe.yaml" in everything(refused("run", tmp_path / "recipe.yaml"))
    assert "missing.yaml" in everything(refused("run", tmp_path / "missing.yaml"))


# Data


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.csv", b"sentense,label\na,b\n", "sentense"),
        ("rows.csv", b"text,label\n", "rows"),
        ("rows.csv", b"", "rows.csv"),
        ("rows.csv", b"text\nna\xefve\n", "rows.csv"),
        ("rows.jsonl", b'{"text": "fine"}\n{"text": \n', "rows.jsonl"),
        ("rows.parquet", b"PAR1 not at all", "rows.parquet"),
    ],
    ids=["column", "no-rows", "empty", "encoding", "broken-json", "broken-parquet"],
)
def test_data_that_cannot_be_used(
    refused: Refused, folder: Path, tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(content)
    error = refused("export", folder, "--data", tmp_path / name, *settings())
    assert told in everything(error)
    assert name in everything(error)


def test_data_that_is_not_there_or_of_no_known_kind(refused: Refused, folder: Path, tmp_path: Path) -> None:
    assert "rows.csv" in everything(refused("export", folder, "--data", tmp_path / "rows.csv"))


def test_a_column_that_is_not_there(refused: Refused, folder: Path, tmp_path: Path) -> None:
    texts = texts_file(tmp_path / "texts.jsonl")
    error = refused("export", folder, "--data", texts, "--column", "text=sentence", *settings())
    assert "sentence" in everything(error)
    assert "--column" in everything(refused("export", folder, "--data", texts, "--column", "text"))


def test_columns_without_data(refused: Refused, folder: Path) -> None:
    error = refused("export", folder, "--column", "text=sentence")
    assert "columns" in error["what"]
    assert "--data" in error["remedy"]


@pytest.mark.parametrize(
    ("columns", "told"),
    [((1, 0), "'The river is long.' in row 1"), ((0, 1), "'awful' in row 2"), ((0, 2), "7 in row 2")],
)
def test_labels_that_are_no_classes_of_the_model(
    refused: Refused, model_folder: Folders, tmp_path: Path, columns: tuple[int, int], told: str
) -> None:
    data = tmp_path / "rows.csv"
    data.write_text("The river is long.,good,2\nWhat a film!,awful,7\n")
    named = [part for role, at in zip(("text", "label"), columns, strict=True) for part in ("--column", f"{role}={at}")]
    error = refused("export", model_folder("bert-classifier"), "--data", data, *named, *settings())
    assert "rows.csv" in error["what"]
    assert told in error["value"]
    assert "bad, fair, good" in error["remedy"]
    assert "--column" in error["remedy"]


@pytest.mark.slow
def test_labels_beyond_the_classes_of_a_model_that_names_none(
    refused: Refused, model_folder: Folders, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(model_folder("bert-classifier"), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    del config["id2label"], config["label2id"]
    (model / "config.json").write_text(json.dumps({**config, "num_labels": 3}))
    for label, told in (("3", "3 in row 1"), ("good", "names none")):
        (tmp_path / "rows.csv").write_text(f"text,label\nThe river is long.,{label}\n")
        assert told in everything(refused("export", model, "--data", tmp_path / "rows.csv", *settings()))


def test_data_of_an_unknown_kind(refused: Refused, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    assert "rows.xlsx" in everything(refused("export", folder, "--data", tmp_path / "rows.xlsx", *settings()))


# Output


def test_an_output_folder_that_is_no_bundle(refused: Refused, folder: Path, work: Path) -> None:
    (work / "mine").mkdir()
    for overwrite in ([], ["--overwrite"]):
        error = refused("export", folder, "--out", work / "mine", *overwrite)
        assert "not a bundle" in error["what"]
        assert "--out" in error["remedy"]
    (work / "mine" / "thesis.txt").write_text("years of work")
    refused("export", folder, "--out", work / "mine", "--overwrite")
    (work / "file").write_text("years of work")
    refused("export", folder, "--out", work / "file", "--overwrite")
    refused("export", folder, "--out", work / "file" / "below")


@pytest.mark.parametrize(
    "out", ["/proc/nothing", "/proc/nothing/below", "n" * 250, f"{'n' * 300}/below", "/".join(["n" * 99] * 50)]
)
def test_an_output_folder_that_cannot_be_made(refused: Refused, folder: Path, cache_root: Path, out: str) -> None:
    error = refused("export", folder, "--out", out)
    assert out[:20] in error["value"]
    assert "--out" in error["remedy"]
    assert list(cache_root.iterdir()) == [], "work began"


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="no file system here that refuses every user")
def test_an_output_folder_that_may_not_be_made(refused: Refused, folder: Path, cache_root: Path) -> None:
    assert "--out" in refused("export", folder, "--out", "/sys/nothing", status=3)["remedy"]
    assert list(cache_root.iterdir()) == [], "work began"


@pytest.mark.slow
def test_an_output_folder_of_another_source_or_recipe(
    refused: Refused, bundle: Path, texts: Path, model_folder: Folders, work: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(bundle, work / "out")
    same = [*settings(*ENCODER), "--data", texts, "--out", out]
    other = make_model("bert", tmp_path / "other", seed=1)
    assert "another source" in refused("export", other, *same)["what"]
    assert "another recipe" in refused("export", model_folder("bert"), "--out", out)["what"]
    assert "--overwrite" in refused("export", model_folder("bert"), "--out", out)["remedy"]
    (out / "config.json").write_text("{}")
    assert "changed" in refused("export", model_folder("bert"), *same)["what"]


# Disk space


@pytest.mark.slow
def test_no_space_for_the_cache(
    refused: Refused, folder: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(small_disk / "cache"))
    error = refused("export", folder, *settings(), status=3)
    assert "space" in error["what"]
    assert "PLANISH_CACHE" in error["remedy"]
    assert list((small_disk / "cache" / "tmp").iterdir()) == []


@pytest.mark.slow
def test_no_space_for_the_bundle(
    refused: Refused,
    bundle: Path,
    cache: Path,
    texts: Path,
    model_folder: Folders,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(cache))
    arguments: Sequence[str | Path] = ["export", model_folder("bert"), "--out", small_disk / "out", "--data", texts]
    error = refused(*arguments, *settings(), status=3)
    assert "space" in error["what"]
    assert "--out" in error["remedy"]
    assert list(small_disk.iterdir()) == []
