"""What shares weights keeps sharing them: in training, in the file, in the exported graph."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exporter.errors import RequestError
from exporter.sources import resolve_source
from exporter.structure import layers_of
from exporter.structure.anatomy import linear_weights
from exporter.tasks import get_task
from pipelines.compress.clusters import cluster
from pipelines.compress.models import MODEL
from pipelines.compress.steps.prune import prune
from pipelines.compress.steps.share import groups_of, share
from tests.models import make_model
from tests.pipelines.compress.conftest import Teacher
from tests.pipelines.compress.data import arguments, logits, opened

RECOVER = {"epochs": 2, "learning_rate": 1e-3, "teacher": False}


def stored(out: Path) -> dict[str, Any]:
    """The tensors of a file; the empty ones only keep others from opening it."""
    return {name: tensor for name, tensor in load_file(out / MODEL / "model.safetensors").items() if tensor.numel()}


@pytest.mark.parametrize(("layers", "shares"), [(2, [0, 0, 2, 2]), ([[1, 3]], [0, 1, 2, 1]), (1, [0, 0, 0, 0])])
def test_layers_of_a_group_are_one_in_memory_file_and_training(
    layers: Any, shares: list[int], teacher: Teacher, train_csv: Path, validation_csv: Path, tmp_path: Path
) -> None:
    """With validation data, so that the best of the checkpoints is read back, in which they are stored once."""
    step = {"layers": layers, "recover": RECOVER}
    record = share(arguments(teacher.folder, tmp_path, step, train=train_csv, validation=validation_csv))
    assert record["size"]["layer_structure"]["shares"] == shares
    assert record["training"]["losses"] or record["training"]["steps"] == 20
    again = opened(tmp_path / MODEL)
    assert [list(layers_of(again)).index(layer) for layer in layers_of(again)] == shares
    names = [name for name in stored(tmp_path) if name.endswith("attention.self.query.weight")]
    assert names == [f"bert.encoder.layer.{number}.attention.self.query.weight" for number in sorted(set(shares))]
    old = opened(teacher.folder)
    assert record["size"]["parameters"] == sum(p.numel() for p in again.parameters())
    assert record["size"]["parameters"] < sum(p.numel() for p in old.parameters())
    assert (tmp_path / MODEL / "model.safetensors").stat().st_size < (
        teacher.folder / "model.safetensors"
    ).stat().st_size


def test_the_first_of_a_group_gives_its_weights(teacher: Teacher, tmp_path: Path) -> None:
    share(arguments(teacher.folder, tmp_path, {"layers": [[1, 2, 3]]}))
    again, old = opened(tmp_path / MODEL), opened(teacher.folder)
    for mine, theirs in zip(layers_of(again), [0, 1, 1, 1], strict=True):
        assert torch.equal(mine.output.dense.weight, layers_of(old)[theirs].output.dense.weight)


def test_a_shared_model_trains_on_and_its_layers_stay_one(teacher: Teacher, train_csv: Path, tmp_path: Path) -> None:
    from pipelines.compress.steps.finetune import finetune

    share(arguments(teacher.folder, tmp_path / "one", {"layers": 2}))
    record = finetune(
        arguments(tmp_path / "one" / MODEL, tmp_path / "two", {"max_steps": 5, "learning_rate": 1e-3}, train=train_csv)
    )
    assert record["size"]["layer_structure"]["shares"] == [0, 0, 2, 2]


def test_an_optimized_graph_has_shared_weights_once(teacher: Teacher, tmp_path: Path) -> None:
    """The exporter writes some of them transposed, once for each place; the pass that merges equal ones is in every
    pipeline."""
    import onnx_ir

    from exporter.onnx_export import export_onnx
    from exporter.original.open import open_original
    from exporter.passes.base import PassContext
    from exporter.passes.dedupe import Deduplicate

    share(arguments(teacher.folder, tmp_path, {"layers": 2}))
    artifact = export_onnx(
        open_original(resolve_source(str(tmp_path / MODEL)), get_task("text-classification")), tmp_path / "onnx"
    )
    graph = onnx_ir.load(artifact.path)
    with PassContext(contract=artifact.contract) as context:
        Deduplicate().apply(graph, context)
    shapes = [tuple(value.shape or ()) for value in graph.graph.initializers.values()]
    squares = [shape for shape in shapes if shape == (32, 32)]
    ups = [shape for shape in shapes if shape in ((32, 64), (64, 32))]
    assert len(squares) == 2 * 4 + 1, "query, key, value and output of two sets of weights, and the pooler"
    assert len(ups) == 2 * 2 + 1, "the feed-forward blocks, and the positions"


@pytest.mark.slow
def test_a_compiled_engine_has_shared_weights_once_and_says_the_same(teacher: Teacher, tmp_path: Path) -> None:
    """oneDNN packs the weights of each product for itself: packed ones that are equal are stored once too."""
    import zipfile

    from torch._inductor.package import package_aoti

    from exporter.original.open import open_original
    from exporter.targets import get_target, inductor
    from exporter.torch_export import export_program

    if not (state := get_target("inductor-cpu").availability()).available:
        pytest.skip(state.reason)
    share(arguments(teacher.folder, tmp_path, {"layers": 1}))
    original = open_original(resolve_source(str(tmp_path / MODEL)), get_task("text-classification"))
    inputs = {name: value.numpy() for name, value in original.example.items()}
    wanted = original.run(inputs)
    artifact = export_program(original, tmp_path / "program")
    package = tmp_path / "model.pt2"
    package_aoti(str(package), inductor.compile_program(artifact.path, tmp_path))
    with zipfile.ZipFile(package) as archive:
        (source,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith(".wrapper.cpp"))
    sizes = [int(size) for size in re.findall(r"constants_info_\[\d+\]\.data_size = (\d+)", source)]
    unique, all_of_them = (list(opened(folder).parameters()) for folder in (tmp_path / MODEL, teacher.folder))
    assert len(unique) < len(all_of_them) / 2
    assert 0 < len(sizes) <= len(unique) + 2, "and what the graph computes from them once"
    engine = inductor.Package(package)
    tensors = [original.example[name] for name in engine.inputs]
    for name, value in zip(engine.outputs, engine.run(tensors), strict=True):
        torch.testing.assert_close(value, torch.from_numpy(wanted[name]), rtol=1e-4, atol=1e-5)


def untied(folder: Path) -> Path:
    return make_model("bert-mlm", folder, changes={"tie_word_embeddings": False})


def test_embeddings_are_tied_and_stored_once(tmp_path: Path) -> None:
    model = untied(tmp_path / "model")
    before = opened(model, "fill-mask")
    assert before.cls.predictions.decoder.weight is not before.bert.embeddings.word_embeddings.weight
    record = share(arguments(model, tmp_path / "out", {"embeddings": True}, task="fill-mask"))
    assert record["shared"]["embeddings"] == {"were_tied": False}
    again = opened(tmp_path / "out" / MODEL, "fill-mask")
    assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight
    table = before.bert.embeddings.word_embeddings.weight
    assert torch.equal(again.bert.embeddings.word_embeddings.weight, table)
    assert len([t for t in stored(tmp_path / "out").values() if t.shape == table.shape]) == 1
    assert record["size"]["parameters"] == sum(p.numel() for p in before.parameters()) - table.numel()
    twice = share(arguments(tmp_path / "out" / MODEL, tmp_path / "twice", {"embeddings": True}, task="fill-mask"))
    assert twice["shared"]["embeddings"] == {"were_tied": True}


def test_a_model_without_an_output_layer_over_its_vocabulary_has_nothing_to_tie(
    teacher: Teacher, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="no output layer over its vocabulary: BertForSequenceClassification"):
        share(arguments(teacher.folder, tmp_path, {"embeddings": True}))


@pytest.mark.parametrize("recover", [None, RECOVER], ids=["at-once", "recovered"])
def test_a_matrix_has_no_more_values_than_asked(
    recover: Any, teacher: Teacher, train_csv: Path, validation_csv: Path, tmp_path: Path
) -> None:
    step = {"clusters": 16, "recover": recover}
    record = share(arguments(teacher.folder, tmp_path, step, train=train_csv, validation=validation_csv))
    assert record["shared"]["clusters"] == 16
    again, old = dict(linear_weights(opened(tmp_path / MODEL))), dict(linear_weights(opened(teacher.folder)))
    for name, weight in again.items():
        assert len(weight.unique()) <= 16
        if recover is None:
            was = old[name].detach()
            even = float(was.max() - was.min()) / 16 / 12**0.5  # the error of values evenly apart
            assert float((weight.detach() - was).square().mean().sqrt()) < even
    bytes_of = {path: (path / "model.safetensors").stat().st_size for path in (tmp_path / MODEL, teacher.folder)}
    saved = 3 * sum(weight.numel() for weight in old.values())  # a byte an element in place of four
    assert bytes_of[tmp_path / MODEL] < bytes_of[teacher.folder] - 0.8 * saved


def test_a_clustered_model_of_plain_structure_opens_as_it_was_left(teacher: Teacher, tmp_path: Path) -> None:
    from pipelines.compress.clusters import cluster_all

    share(arguments(teacher.folder, tmp_path, {"clusters": 256}))
    expected = opened(teacher.folder)
    cluster_all(list(linear_weights(expected)), 256)
    torch.testing.assert_close(logits(opened(tmp_path / MODEL)), logits(expected), rtol=0, atol=0)


def test_zeros_of_a_pruned_model_stay_zero_in_clusters(teacher: Teacher, train_csv: Path, tmp_path: Path) -> None:
    prune(arguments(teacher.folder, tmp_path / "pruned", {"sparsity": 0.6, "scope": "layer"}, train=train_csv))
    step = {"clusters": 8, "recover": RECOVER}
    share(arguments(tmp_path / "pruned" / MODEL, tmp_path / "shared", step, train=train_csv))
    before, after = (dict(linear_weights(opened(tmp_path / name / MODEL))) for name in ("pruned", "shared"))
    for name, weight in after.items():
        assert torch.equal(weight == 0, before[name] == 0)
        assert len(weight.unique()) <= 8


def test_clusters_are_as_good_as_an_exhaustive_search_of_few_values() -> None:
    weight = torch.tensor([[-1.0, -1.02, -0.98, 0.5], [0.52, 0.48, 2.0, 2.0]])
    codes = cluster(weight, 3)
    assert codes.tolist() == [[0, 0, 0, 1], [1, 1, 2, 2]]


@pytest.mark.parametrize("step", [{"layers": 2}, {"clusters": 16}, {"layers": 2, "clusters": 16}], ids=str)
def test_transformers_alone_refuses_what_it_would_fill_with_random_numbers(
    step: dict[str, Any], teacher: Teacher, tmp_path: Path
) -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification

    share(arguments(teacher.folder, tmp_path, step))
    opened(tmp_path / MODEL)
    for auto in (AutoModelForSequenceClassification, AutoModel):
        with pytest.raises(RuntimeError, match="mismatch"):
            auto.from_pretrained(tmp_path / MODEL)


def test_the_sources_card_claims_nothing_of_what_was_made_of_it(teacher: Teacher, tmp_path: Path) -> None:
    import shutil

    source, card = (
        shutil.copytree(teacher.folder, tmp_path / "source"),
        "---\nlicense: mit\n---\n# Best of all models\n",
    )
    (source / "README.md").write_text(card, encoding="utf-8")
    share(arguments(source, tmp_path / "one", {"layers": 2}))
    share(arguments(tmp_path / "one" / MODEL, tmp_path / "two", {"clusters": 16}))
    for made in (tmp_path / "one" / MODEL, tmp_path / "two" / MODEL):
        assert (made / "README.source.md").read_text(encoding="utf-8") == card
        own = (made / "README.md").read_text(encoding="utf-8")
        assert "Best of all" not in own
        assert "README.source.md" in own
        assert resolve_source(str(made)).licence == "mit"


def test_others_may_read_what_was_written(teacher: Teacher, tmp_path: Path) -> None:
    share(arguments(teacher.folder, tmp_path, {"layers": 2}))
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / MODEL).iterdir() if path.is_file()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_groups() -> None:
    assert groups_of(3, 6) == [[0, 1], [2, 3], [4, 5]]
    assert [number for group in groups_of(4, 6) for number in group] == list(range(6))
    with pytest.raises(RequestError, match=r"there are fewer layers than groups: 5 groups. The model has 4 layers"):
        groups_of(5, 4)


@pytest.mark.parametrize("layers", [[[0, 7]], [[0, 1], [1, 2]]])
def test_groups_that_cannot_be(layers: Any, teacher: Teacher, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"not groups of layers: .*Layers 0 to 3, each at most once"):
        share(arguments(teacher.folder, tmp_path, {"layers": layers}))


def test_layers_of_other_shapes_cannot_share(planted: Callable[..., Path], teacher: Teacher, tmp_path: Path) -> None:
    from exporter.structure import remove_heads

    pruned = planted(teacher.folder, lambda model: remove_heads(model, 1, [0]))
    with pytest.raises(RequestError, match="layers that differ in shape cannot share weights: 0 and 1"):
        share(arguments(pruned, tmp_path, {"layers": 2}))
