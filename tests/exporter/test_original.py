from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.errors import RequestError
from exporter.original import Original, open_described, open_original, original_arguments
from exporter.original.pooling import POOLINGS, Pooling
from exporter.preprocess import ImageEncoder, TextEncoder
from exporter.sources import resolve_source
from exporter.targets.base import check_inputs
from exporter.tasks import get_task, infer_task
from tests.models import KINDS

Folders = Callable[..., Path]
TEXTS = ["The river is long.", "What a film, said the old man; and the city sleeps!", "music"]


def opened(spec: str | Path, task: str | None = None, **options: Any) -> Original:
    source = resolve_source(str(spec), trust=True)
    return open_original(source, get_task(task) if task else infer_task(source), **options)


def refused(spec: str | Path, task: str | None = None, **options: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        opened(spec, task, **options)
    return caught.value


def axes(original: Original) -> dict[str, tuple[int, int]]:
    return {axis.name: (axis.min, axis.max) for axis in original.signature.axes}


def edited(folder: Path, to: Path, **changes: Any) -> Path:
    made = Path(shutil.copytree(folder, to))
    config = {**json.loads((made / "config.json").read_text()), **changes}
    (made / "config.json").write_text(json.dumps(config))
    return made


# Hugging Face folders


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_opens_and_keeps_its_signature(model_folder: Folders, kind: str) -> None:
    original = opened(model_folder(kind))
    assert not original.module.training
    assert {p.dtype for p in original.module.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in original.module.parameters())
    assert tuple(spec.name for spec in original.signature.inputs) == KINDS[kind].inputs
    names = tuple(spec.name for spec in original.signature.outputs)
    assert names == tuple(name for name in original.task.outputs if name in names)
    assert names
    inputs = {name: value.numpy() for name, value in original.example.items()}
    check_inputs(inputs, original.signature, original.contract)
    outputs = original.run(inputs)
    sizes = {"batch": 2, "sequence": 16}
    for spec in original.signature.outputs:
        assert outputs[spec.name].shape == tuple(sizes.get(dim, dim) for dim in spec.shape)  # type: ignore[arg-type]
        assert outputs[spec.name].dtype == spec.dtype
        assert np.isfinite(outputs[spec.name]).all()


@pytest.mark.parametrize("kind", ["bert", "albert", "distilbert", "mpnet", "deberta-v2", "modernbert"])
def test_the_longest_and_the_shortest_sequences_run(model_folder: Folders, kind: str) -> None:
    original = opened(model_folder(kind))
    assert axes(original)["sequence"] == (1, 64)
    high = original.contract.id_ranges["input_ids"][1]
    for length in (1, 64):
        # The largest token id everywhere: none of them is padding, so position counting goes as far as it can.
        inputs = {spec.name: np.ones((2, length), np.int64) for spec in original.signature.inputs}
        inputs["input_ids"][:] = high
        original.run(inputs)
    inputs = {name: np.ones((2, 65), np.int64) for name in inputs}
    with pytest.raises(RequestError, match="sequence"):
        check_inputs(inputs, original.signature, original.contract)


@pytest.mark.parametrize("family", ["OPT", "Bart"])
def test_positions_before_an_offset_are_not_counted(family: str) -> None:
    import torch
    import transformers

    from exporter.original.huggingface import position_limit

    sizes = {"vocab_size": 50, "max_position_embeddings": 16, "pad_token_id": 1}
    if family == "OPT":
        sizes |= {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32}
        sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    else:
        sizes |= {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
        sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}Model")(config).eval()
    limit = position_limit(model)
    assert limit == 16
    model(input_ids=torch.full((1, limit), 5), attention_mask=torch.ones(1, limit, dtype=torch.long))
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, limit + 1), 5), attention_mask=torch.ones(1, limit + 1, dtype=torch.long))


def test_positions_behind_a_padding_index_are_not_counted(model_folder: Folders) -> None:
    original = opened(model_folder("mpnet"))
    assert original.module.config.max_position_embeddings == 66
    inputs = {name: np.full((1, 65), 9, np.int64) for name in ("input_ids", "attention_mask")}
    inputs["attention_mask"][:] = 1
    with pytest.raises(IndexError):
        original.run(inputs)  # the limit is the model's own, not ours


def test_it_agrees_with_the_plain_library(model_folder: Folders) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = model_folder("bert-classifier")
    original = opened(folder)
    assert isinstance(original.encoder, TextEncoder)
    found = original.run(original.encoder.encode(TEXTS))["logits"]
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = AutoModelForSequenceClassification.from_pretrained(folder)(**tokens).logits
    np.testing.assert_array_equal(found, wanted.numpy())


@pytest.mark.parametrize("kind", ["bert", "bert-dense"])
def test_embeddings_agree_with_sentence_transformers(model_folder: Folders, kind: str) -> None:
    library = pytest.importorskip("sentence_transformers")
    folder = model_folder(kind)
    original = opened(folder)
    assert isinstance(original.encoder, TextEncoder)
    found = original.run(original.encoder.encode(TEXTS))["sentence_embedding"]
    wanted = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_real_embeddings_agree_with_sentence_transformers(minilm: str) -> None:
    library = pytest.importorskip("sentence_transformers")
    original = opened(minilm)
    assert isinstance(original.encoder, TextEncoder)
    texts = [*TEXTS, "word " * 400]
    found = original.run(original.encoder.encode(texts))["sentence_embedding"]
    wanted = library.SentenceTransformer(str(original.source.path), device="cpu").encode(texts)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert axes(original) == {"batch": (1, 1024), "sequence": (1, 512)}


@pytest.mark.parametrize("mode", sorted(POOLINGS))
def test_poolings_agree_with_sentence_transformers(mode: str) -> None:
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(4, 6, 8, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 0]])
    reference = modules.Pooling(8, pooling_mode=mode)
    wanted = reference({"token_embeddings": hidden, "attention_mask": mask})["sentence_embedding"]
    torch.testing.assert_close(Pooling((mode,))(hidden, mask), wanted)


def test_several_poolings_are_concatenated(model_folder: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder("bert"), tmp_path / "m"))
    settings = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert opened(folder).signature.outputs[1].shape == ("batch", 64)


def test_a_copy_in_another_precision_runs_its_own_weights(model_folder: Folders) -> None:
    original = opened(model_folder("bert"))
    double = copy.deepcopy(original.module).double()
    outputs = double(**original.example)
    assert {value.dtype for value in outputs.values()} == {torch.float64}
    single = original.module(**original.example)
    for name, value in outputs.items():
        error = (value - single[name]).norm() / value.norm()
        assert 0 < error < 1e-5
    with torch.no_grad():
        for parameter in double.parameters():
            parameter.zero_()
    again = original.module(**original.example)
    assert torch.equal(again["last_hidden_state"], single["last_hidden_state"])


def test_half_precision_copies_run(model_folder: Folders) -> None:
    original = opened(model_folder("bert-dense"))
    half = copy.deepcopy(original.module).to(torch.bfloat16)
    assert {value.dtype for value in half(**original.example).values()} == {torch.bfloat16}


def test_the_limits_asked_for_narrow_the_axes(model_folder: Folders) -> None:
    original = opened(model_folder("bert"), max_length=20, max_batch=4)
    assert axes(original) == {"batch": (1, 4), "sequence": (1, 20)}
    assert isinstance(original.encoder, TextEncoder)
    assert original.encoder.max_length == 20


def test_a_limit_beyond_the_sources_own_is_refused(model_folder: Folders) -> None:
    error = refused(model_folder("bert"), max_length=65)
    assert "64 tokens" in str(error.remedy)
    assert "at least 1" in refused(model_folder("bert"), max_batch=0).what


def test_the_contract_says_what_the_caller_promises(model_folder: Folders) -> None:
    contract = opened(model_folder("bert")).contract
    assert (contract.attends, contract.mask) == (True, "attention_mask")
    assert contract.id_ranges == {"input_ids": (0, 351), "attention_mask": (0, 1), "token_type_ids": (0, 1)}
    assert not opened(model_folder("bert"), attends=False).contract.attends


def test_images_have_a_fixed_size_and_a_dynamic_batch(model_folder: Folders) -> None:
    original = opened(model_folder("vit"))
    assert original.signature.inputs[0].shape == ("batch", 3, 32, 32)
    assert original.modality == "image"
    assert isinstance(original.encoder, ImageEncoder)
    image = np.zeros((50, 40, 3), np.uint8)
    assert original.run(original.encoder.encode([image]))["logits"].shape == (1, 3)
    features = opened(model_folder("vit"), "feature-extraction")
    assert (features.modality, features.task.modality) == ("image", "image")
    assert features.signature.outputs[0].shape == ("batch", 17, 32)


def test_an_unused_pooler_is_left_out(model_folder: Folders) -> None:
    names = [name for name, _ in opened(model_folder("bert")).module.named_parameters()]
    assert not [name for name in names if name.startswith("pooler")]


def test_half_precision_weights_are_opened_in_fp32(model_folder: Folders, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(model_folder("bert-classifier"), tmp_path / "m"))
    state = {name: value.half() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert {p.dtype for p in opened(folder).module.parameters()} == {torch.float32}


def test_pickled_weights_give_the_same_model(model_folder: Folders, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = Path(shutil.copytree(model_folder("bert-classifier"), tmp_path / "m"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    inputs = {name: value.numpy() for name, value in opened(folder).example.items()}
    wanted = opened(model_folder("bert-classifier")).run(inputs)["logits"]
    np.testing.assert_array_equal(opened(folder).run(inputs)["logits"], wanted)


# Folders that cannot be opened for a task


def test_missing_head_weights_are_named(model_folder: Folders, tmp_path: Path) -> None:
    folder = edited(model_folder("bert-plain"), tmp_path / "m", architectures=None)
    error = refused(folder, "text-classification")
    assert "random" in error.what
    assert str(error.value) == "classifier.bias, classifier.weight"


def test_weights_of_another_shape_are_named(model_folder: Folders, tmp_path: Path) -> None:
    folder = edited(model_folder("bert-classifier"), tmp_path / "m", intermediate_size=48)
    assert "intermediate.dense" in str(refused(folder).value)


def test_a_layer_that_is_missing_is_named(model_folder: Folders, tmp_path: Path) -> None:
    folder = edited(model_folder("bert-classifier"), tmp_path / "m", num_hidden_layers=3)
    assert "layer.2" in str(refused(folder).value)


def test_a_configuration_that_makes_no_model(model_folder: Folders, tmp_path: Path) -> None:
    folder = edited(model_folder("bert-classifier"), tmp_path / "m", num_attention_heads=5)
    error = refused(folder)
    assert "cannot be loaded for text-classification" in error.what


def test_a_task_that_transformers_has_no_class_for(model_folder: Folders, tmp_path: Path) -> None:
    folder = edited(model_folder("vit"), tmp_path / "m", architectures=None)
    assert "cannot be loaded for fill-mask" in refused(folder, "fill-mask").what


def test_declared_inputs_belong_to_custom(model_folder: Folders) -> None:
    assert "custom" in refused(model_folder("bert"), custom={"inputs": {}}).what


@pytest.mark.parametrize(
    ("modules", "told"),
    [
        ([{"type": "x.Transformer"}, {"type": "x.Pooling", "path": "1_Pooling"}, {"type": "x.LSTM"}], "LSTM"),
        ([{"type": "x.WordEmbeddings"}, {"type": "x.Pooling", "path": "1_Pooling"}], "begin with a Transformer"),
        ([{"type": "x.Transformer"}, {"type": "x.Pooling", "path": "gone"}], "no config.json"),
        ([{"type": "x.Transformer"}, {"type": "x.Normalize"}, {"type": "x.Pooling"}], "one Pooling"),
        ([{"kind": "x"}], "sentence-transformers writes"),
    ],
)
def test_sentence_modules_that_are_not_supported(
    model_folder: Folders, tmp_path: Path, modules: Any, told: str
) -> None:
    folder = Path(shutil.copytree(model_folder("bert"), tmp_path / "m"))
    (folder / "modules.json").write_text(json.dumps(modules))
    assert told in str(refused(folder, "feature-extraction"))


def test_an_unknown_pooling(model_folder: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder("bert"), tmp_path / "m"))
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "median"}')
    assert "median" in str(refused(folder))


# Factories


def test_a_convolutional_factory() -> None:
    original = opened("tests.models:conv_factory")
    assert original.example["image"].shape[0] == 2  # tracers take a batch of one for a constant
    assert [(s.name, s.shape) for s in original.signature.outputs] == [
        ("scores", ("batch", 10)),
        ("embedding", ("batch", 32)),
    ]
    assert axes(original) == {"batch": (1, 1024)}
    assert original.encoder is None
    assert original.run({"image": np.zeros((5, 3, 32, 32), np.float32)})["scores"].shape == (5, 10)


MIXER = {
    "inputs": {
        "weights": {"dtype": "float32", "shape": ("batch", "time")},
        "values": {"dtype": "float32", "shape": ("batch", "time", 8)},
    },
    "outputs": ("mixed", "total"),
    "axes": {"batch": {"min": 1, "max": 8}, "time": {"min": 2, "max": 30}},
}


def test_declared_inputs_outputs_and_axes() -> None:
    original = opened("tests.models:sequence_factory", custom=MIXER)
    assert [spec.name for spec in original.signature.inputs] == ["weights", "values"]
    assert [(s.name, s.shape) for s in original.signature.outputs] == [
        ("mixed", ("batch", "time", 8)),
        ("total", ("batch", 8)),
    ]
    assert axes(original) == {"batch": (1, 8), "time": (2, 30)}
    values = np.random.default_rng(0).normal(size=(1, 30, 8)).astype(np.float32)
    found = original.run({"values": values, "weights": np.ones((1, 30), np.float32)})
    np.testing.assert_allclose(found["mixed"].sum(1), found["total"], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"inputs": {"values": {"dtype": "float32", "shape": ("batch", "time", 8)}}}, "not those of the example"),
        ({"inputs": {**MIXER["inputs"], "weights": {"dtype": "int64", "shape": ("batch", "time")}}}, "dtype"),
        ({"inputs": {**MIXER["inputs"], "weights": {"dtype": "float32", "shape": ("batch", 4)}}}, "does not fit"),
        ({"inputs": {**MIXER["inputs"], "weights": {"dtype": "float32", "shape": ("batch",)}}}, "does not fit"),
        ({"inputs": {**MIXER["inputs"], "weights": {"dtype": "float32", "shape": ("time", "batch")}}}, "two lengths"),
        ({"outputs": ("only",)}, "another number of tensors"),
    ],
)
def test_declarations_that_do_not_fit(change: dict[str, Any], told: str) -> None:
    assert told in str(refused("tests.models:sequence_factory", custom={**MIXER, **change}))


def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, body: str) -> str:
    (tmp_path / f"{name}.py").write_text(f"import torch\n{body}")
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"{name}:make"


POOLED = """
class Pooled(torch.nn.Module):
    def forward(self, x):
        pooled = torch.nn.functional.avg_pool1d(x, 4)
        return {"pooled": pooled, "whole": x[:, :, : x.shape[2] // 16 * 16], "far": x[:, 0, : x.shape[2] // 64 + 1]}

def make():
    return Pooled(), {"x": torch.arange(96.0).reshape(2, 3, 16)}
"""


def test_an_output_that_keeps_its_length_from_one_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporter.artifact import Variant
    from exporter.onnx_export import export_onnx
    from exporter.targets import get_target

    custom = {
        "inputs": {"x": {"dtype": "float32", "shape": ["batch", 3, "sequence"]}},
        "axes": {"batch": {"min": 1, "max": 8}, "sequence": {"min": 16, "max": 128}},
    }
    original = opened(factory(tmp_path, monkeypatch, "pooled", POOLED), "custom", custom=custom)
    shapes = {spec.name: spec.shape for spec in original.signature.outputs}
    assert shapes["pooled"] == ("batch", 3, "pooled_2")
    assert shapes["whole"] == ("batch", 3, "whole_2")  # 16 at 16, 16 at 17, 32 at 32: it does not follow
    assert shapes["far"] == ("batch", 1)  # nothing between 16 and 32 shows that it is not
    exported = export_onnx(original, tmp_path / "out")
    assert {spec.name: spec.shape for spec in exported.signature.outputs} == {**shapes, "far": ("batch", "far_1")}
    session = get_target("onnxruntime-cpu").open(exported, Variant("onnxruntime-cpu", "fp32"), threads=1)
    for length in (16, 17, 32, 128):
        x = {"x": np.random.default_rng(length).standard_normal((2, 3, length)).astype(np.float32)}
        for name, value in original.run(x).items():
            np.testing.assert_allclose(session.run(x)[name], value, rtol=1e-6)


def test_a_module_that_wants_its_own_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
class Fixed(torch.nn.Module):
    def forward(self, x):
        return x.view(2, 6) + 1

def make():
    return Fixed(), {"x": torch.zeros(2, 2, 3)}
"""
    error = refused(factory(tmp_path, monkeypatch, "fixed_batch", body))
    assert "axis 'batch'" in error.what
    assert "custom" in str(error.remedy)


def test_a_module_that_fails_on_its_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "def make(): return torch.nn.Linear(3, 2), {'input': torch.zeros(2, 4)}\n"
    assert "example inputs" in refused(factory(tmp_path, monkeypatch, "wrong_example", body)).what


def test_derived_dimensions_nested_results_and_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
class Net(torch.nn.Module):
    def forward(self, first, second):
        return {"sum": first + second, "parts": [first.reshape(-1), second.half()]}

def make():
    return Net().double(), {"a": torch.zeros(1, 3, dtype=torch.float64), "b": torch.ones(1, 3, dtype=torch.float16)}
"""
    original = opened(factory(tmp_path, monkeypatch, "nested_net", body))
    assert [(s.name, s.dtype, s.shape) for s in original.signature.outputs] == [
        ("sum", "float32", ("batch", 3)),
        ("parts_0", "float32", ("parts_0_0",)),
        ("parts_1", "float16", ("batch", 3)),
    ]
    assert {spec.dtype for spec in original.signature.inputs} == {"float32"}


def test_a_factory_that_changes_its_mind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
count = 0

def make():
    global count
    count += 1
    net = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(net.weight, count)
    return net, {"input": torch.zeros(1, 2)}
"""
    assert "another model" in refused(factory(tmp_path, monkeypatch, "moody", body)).what


def test_random_initialisation_is_the_same_at_every_call() -> None:
    state = torch.random.get_rng_state()
    one, two = (opened("tests.models:conv_factory").module.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(torch.random.get_rng_state(), state)


# Programs


def test_a_program_brings_its_own_axes(model_folder: Folders, tmp_path: Path) -> None:
    original = opened(model_folder("bert"))
    dims = {axis.name: torch.export.Dim(axis.name, min=1, max=axis.max) for axis in original.signature.axes}
    shapes = {name: {0: dims["batch"], 1: dims["sequence"]} for name in original.example}
    program = torch.export.export(original.module, (), kwargs=original.example, dynamic_shapes=shapes, strict=False)
    torch.export.save(program, tmp_path / "bert.pt2")
    loaded = opened(tmp_path / "bert.pt2")
    assert loaded.signature == original.signature
    assert not loaded.contract.attends
    inputs = {name: np.ones((3, 11), np.int64) for name in original.example}
    wanted, found = original.run(inputs), loaded.run(inputs)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6)
    narrow = opened(tmp_path / "bert.pt2", max_batch=4, max_length=9)
    assert axes(narrow) == {"batch": (1, 4), "sequence": (1, 9)}


def test_a_program_of_positions_and_fixed_sizes(tmp_path: Path) -> None:
    program = torch.export.export(torch.nn.Bilinear(2, 3, 4), (torch.zeros(5, 2), torch.zeros(5, 3)))
    torch.export.save(program, tmp_path / "pair.pt2")
    original = opened(tmp_path / "pair.pt2")
    assert [(s.name, s.shape) for s in original.signature.inputs] == [("input1", (5, 2)), ("input2", (5, 3))]
    assert original.signature.outputs[0].shape == (5, 4)
    assert original.signature.axes == ()


def test_an_archive_that_is_no_program(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("hello", "world")
    assert "cannot be loaded" in refused(tmp_path / "other.pt2").what


# ONNX files


def onnx_text_model(folder: Path) -> Path:
    """A lookup table with an attention mask, with the axis names that other exporters write."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    table = numpy_helper.from_array(np.arange(40, dtype=np.float32).reshape(10, 4), "table")
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["wide"]),
        helper.make_node("Mul", ["rows", "wide"], ["hidden"]),
    ]
    axes = ["batch_size", "sequence_length"]
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, axes) for n in ("input_ids", "attention_mask")]
    outputs = [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [*axes, 4])]
    last = numpy_helper.from_array(np.array([-1], np.int64), "last")
    graph = helper.make_graph(nodes, "g", inputs, outputs, [table, last])
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "m.onnx")
    return folder / "m.onnx"


def test_an_onnx_file_is_its_own_original(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    original = opened(onnx_text_model(tmp_path), max_length=77)
    assert original.module is None
    assert original.task.name == "custom"
    assert original.signature.outputs[0].shape == ("batch", "sequence", 4)
    assert axes(original) == {"batch": (1, 1024), "sequence": (1, 77)}
    assert original.contract.mask == "attention_mask"
    inputs = {"input_ids": np.array([[3, 1]]), "attention_mask": np.array([[1, 0]])}
    np.testing.assert_array_equal(original.run(inputs)["hidden"], [[[12, 13, 14, 15], [0, 0, 0, 0]]])
    check_inputs({n: v.numpy() for n, v in original.example.items()}, original.signature, original.contract)


def test_an_onnx_file_finds_the_tokenizer_of_its_folder(model_folder: Folders, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    folder = Path(shutil.copytree(model_folder("bert"), tmp_path / "m"))
    path = onnx_text_model(folder / "onnx")
    assert infer_task(resolve_source(str(path))).name == "custom"
    renamed(path, "hidden", "last_hidden_state")
    assert infer_task(resolve_source(str(path))).name == "feature-extraction"
    original = opened(path)
    assert isinstance(original.encoder, TextEncoder)
    assert list(original.encoder.encode(["the city"])) == ["input_ids", "attention_mask"]


def onnx_file(path: Path, text: str) -> Path:
    import onnx.parser

    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')
    onnx.save(model, path)
    return path


def run_exported(original: Original, folder: Path, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    from exporter.artifact import Variant
    from exporter.onnx_export import import_onnx
    from exporter.targets import get_target

    exported = import_onnx(original, folder)
    variant = Variant("onnxruntime-cpu", "fp32")
    return get_target("onnxruntime-cpu").open(exported, variant, threads=1).run(given)


def test_two_lengths_of_an_onnx_file_never_become_one_axis(tmp_path: Path) -> None:
    text = """g (float[sequence_length, 4] a, float[4, encoder_sequence_length] b, float[batch_size, N] c)
        => (float[sequence_length, encoder_sequence_length] y, float[batch_size, N] z) {
        y = MatMul (a, b)
        z = Relu (c)
    }"""
    original = opened(onnx_file(tmp_path / "m.onnx", text), "custom")
    assert [spec.shape for spec in original.signature.inputs] == [
        ("sequence", 4),
        (4, "encoder_sequence_length"),
        ("batch", "N"),
    ]
    assert original.signature.outputs[0].shape == ("sequence", "encoder_sequence_length")
    given = {name: np.ones(shape, np.float32) for name, shape in (("a", (3, 4)), ("b", (4, 5)), ("c", (2, 6)))}
    assert run_exported(original, tmp_path / "out", given)["y"].shape == (3, 5)


def test_a_length_of_the_outputs_alone_is_no_axis_of_the_inputs(tmp_path: Path) -> None:
    text = """g (float[batch_size, 4] x) => (int64[N, 2] y, int64[batch, 2] z) {
        places = NonZero (x)
        y = Transpose (places)
        z = Identity (y)
    }"""
    original = opened(onnx_file(tmp_path / "m.onnx", text), "custom")
    assert original.signature.inputs[0].shape == ("batch", 4)
    assert [spec.shape for spec in original.signature.outputs] == [("N", 2), ("z_0", 2)]
    assert run_exported(original, tmp_path / "out", {"x": np.ones((2, 4), np.float32)})["z"].shape == (8, 2)


def test_an_onnx_output_without_a_shape_is_no_scalar(tmp_path: Path) -> None:
    import onnx

    path = onnx_file(tmp_path / "m.onnx", "g (float[batch, 4] x) => (float[batch, 4] y) { y = Relu (x) }")
    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, path)
    original = opened(path, "custom")
    assert original.signature.outputs[0].shape == ("y_0", "y_1")
    assert run_exported(original, tmp_path / "out", {"x": np.ones((2, 4), np.float32)})["y"].shape == (2, 4)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(model, path)
    assert "declares no shape" in refused(path, "custom").what


def test_an_onnx_file_that_the_runtime_refuses(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    import onnx

    path = onnx_text_model(tmp_path)
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, path)
    error = refused(path)
    assert "ONNX Runtime cannot open" in error.what
    assert "NoSuchOperator" in str(error.value)


def test_limits_and_ranges_of_an_onnx_file(model_folder: Folders, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    folder = Path(shutil.copytree(model_folder("distilbert"), tmp_path / "m"))
    path = onnx_text_model(folder / "onnx")
    original = opened(path, "custom")
    positions = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    assert axes(original)["sequence"] == (1, positions)
    assert axes(opened(path, "custom", max_length=9))["sequence"] == (1, 9)
    assert original.contract.id_ranges == {"input_ids": (0, 9), "attention_mask": (0, 1)}  # the table has ten rows
    with pytest.raises(RequestError, match=r"does not run with inputs of the shapes input_ids \[1, 1\]"):
        original.run({"input_ids": np.array([[10]]), "attention_mask": np.array([[1]])})


def test_an_onnx_file_that_does_not_fit_its_task(model_folder: Folders, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = onnx_text_model(tmp_path / "alone")
    assert "no output of text-classification" in refused(path, "text-classification").what
    renamed(path, "hidden", "last_hidden_state")
    assert "tokenizer beside it" in refused(path, "feature-extraction").what


def renamed(path: Path, old: str, new: str) -> None:
    """Give an output of the graph another name."""
    import onnx

    model = onnx.load(path)
    for node in model.graph.node:
        node.output[:] = [new if name == old else name for name in node.output]
    for value in model.graph.output:
        value.name = new if value.name == old else value.name
    onnx.save(model, path)


def test_axes_of_an_onnx_file_can_be_declared(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = onnx_text_model(tmp_path)
    declared = {"inputs": {}, "outputs": [], "axes": {"sequence": {"min": 4, "max": 9}}}
    assert axes(opened(path, custom=declared))["sequence"] == (4, 9)
    declared["axes"] = {"time": {"min": 1, "max": 2}}
    assert refused(path, custom=declared).value == "time"


# Plain data


def test_an_original_opens_from_plain_data(model_folder: Folders) -> None:
    source = resolve_source(str(model_folder("bert")))
    arguments = json.loads(json.dumps(original_arguments(source, infer_task(source), max_length=33, attends=False)))
    original = open_described(arguments)
    assert axes(original)["sequence"] == (1, 33)
    assert not original.contract.attends


def test_a_model_that_does_not_tell_its_embeddings_has_its_configurations_vocabulary() -> None:
    from types import SimpleNamespace

    from exporter.original.huggingface import _vocabulary

    class Silent:
        def __init__(self, **config: int) -> None:
            self.config = SimpleNamespace(**config)

        def get_input_embeddings(self) -> None:
            raise NotImplementedError

    assert _vocabulary(Silent(vocab_size=77)) == 77
    with pytest.raises(RequestError, match=r"size of the vocabulary is not known: Silent. Have the class define"):
        _vocabulary(Silent())
