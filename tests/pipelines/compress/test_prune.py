"""Pruning removes what was asked for, the least important first, and training afterwards does not bring it back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.errors import RequestError
from exporter.structure import layer_parts, layers_of, share_layers
from exporter.structure.anatomy import linear_weights
from pipelines.compress.magnitude import KeepZeros, smallest_masked, two_of_four
from pipelines.compress.models import MODEL
from pipelines.compress.steps.finetune import finetune
from pipelines.compress.steps.prune import importance, lowest, prune
from tests.models import KINDS, make_model
from tests.pipelines.compress.conftest import Teacher
from tests.pipelines.compress.data import arguments, logits, opened, texts, weights_of, write_csv

RECOVER = {"max_steps": 12, "learning_rate": 1e-3, "teacher": False}


def zeros_of(out: Path) -> tuple[int, int, dict[str, Any]]:
    """Zeros and elements of the encoder's matrices, and the matrices."""
    found = dict(linear_weights(opened(out / MODEL)))
    return sum(int((w == 0).sum()) for w in found.values()), sum(w.numel() for w in found.values()), found


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("recover", [None, RECOVER], ids=["at-once", "recovered"])
def test_exactly_the_share_asked_for_is_zero(
    scope: str, recover: Any, teacher: Teacher, train_csv: Path, tmp_path: Path
) -> None:
    step = {"sparsity": 0.7, "scope": scope, "recover": recover}
    record = prune(arguments(teacher.folder, tmp_path, step, train=train_csv))
    zeros, total, found = zeros_of(tmp_path)
    if scope == "global":
        assert zeros == round(0.7 * total)
    else:
        assert all(int((w == 0).sum()) == round(0.7 * w.numel()) for w in found.values())
    assert record["removed"]["sparsity"] == pytest.approx(zeros / total)
    before = dict(linear_weights(opened(teacher.folder)))
    changed = sum(int(((found[n] != before[n]) & (found[n] != 0)).sum()) for n in found)
    assert (changed > 0) == (recover is not None), "the weights that stay are trained, and only then changed"


def test_of_equal_weights_no_more_go_than_asked() -> None:
    weights = [("a", torch.ones(10, 10)), ("b", 2 * torch.ones(5, 20))]
    masks = smallest_masked(weights, 0.3, "global")
    assert [int((~masks[name]).sum()) for name in "ab"] == [60, 0]
    assert [int((~m).sum()) for m in smallest_masked(weights, 0.3, "layer").values()] == [30, 30]


def test_gradual_pruning_reaches_the_share_though_an_earlier_model_was_better(
    teacher: Teacher, train_csv: Path, validation_csv: Path, tmp_path: Path
) -> None:
    step = {"sparsity": 0.95, "gradual": 4, "recover": {"epochs": 4, "learning_rate": 1e-4, "teacher": False}}
    record = prune(arguments(teacher.folder, tmp_path, step, train=train_csv, validation=validation_csv))
    scores = [entry["score"] for entry in record["training"]["evaluations"]]
    assert scores[0] > max(scores[2:]), "the first, little pruned, should be the best for this test to tell anything"
    zeros, total, _ = zeros_of(tmp_path)
    assert zeros == round(0.95 * total)


def test_gradual_pruning_goes_up_in_its_parts() -> None:
    keeping = KeepZeros(0.8, "global", 4, None)
    steps = [keeping._due(part, 40) for part in range(1, 5)]
    assert steps == [0, 5, 10, 15], "through in the first half"
    assert keeping.unfinished


@pytest.mark.parametrize("recover", [None, RECOVER], ids=["at-once", "recovered"])
def test_two_of_every_four_are_zero(recover: Any, teacher: Teacher, train_csv: Path, tmp_path: Path) -> None:
    prune(arguments(teacher.folder, tmp_path, {"pattern": "2:4", "recover": recover}, train=train_csv))
    before = dict(linear_weights(opened(teacher.folder)))
    for name, weight in zeros_of(tmp_path)[2].items():
        groups = weight.detach().reshape(-1, 4)
        assert ((groups != 0).sum(dim=1) == 2).all(), name
        old = before[name].detach().reshape(-1, 4).abs()
        kept = old[groups != 0].view(-1, 2).min(dim=1).values
        gone = old[groups == 0].view(-1, 2).max(dim=1).values
        assert (kept >= gone).all(), "the larger two stay"


def test_a_matrix_that_four_does_not_divide_is_named() -> None:
    with pytest.raises(RequestError, match=r"cannot be divided into groups of four: some.weight has 6 inputs"):
        two_of_four([("some.weight", torch.randn(4, 6))])


def test_a_matrix_that_would_be_empty_is_named(
    planted: Callable[..., Path], teacher: Teacher, train_csv: Path, tmp_path: Path
) -> None:
    tiny = planted(teacher.folder, lambda model: layer_parts(model, 2).value.weight.data.mul_(1e-6))
    with pytest.raises(RequestError, match="leave a weight matrix empty") as caught:
        prune(arguments(tiny, tmp_path, {"sparsity": 0.5}, train=train_csv))
    assert "encoder.layer.2.attention.self.value.weight at a sparsity of 0.5" in caught.value.value
    assert caught.value.remedy == "Lower the sparsity, or prune with scope: layer"
    prune(arguments(tiny, tmp_path, {"sparsity": 0.5, "scope": "layer"}, train=train_csv))


def dead_parts(model: Any) -> None:
    """Two heads of layer 1, one of layer 3, 32 neurons of layer 0 and 16 of layer 2 change nothing."""
    for layer, heads in ((1, [0, 2]), (3, [3])):
        for head in heads:
            layer_parts(model, layer).output.weight.data[:, head * 8 : head * 8 + 8] = 0
    for layer, neurons in ((0, range(10, 42)), (2, range(16))):
        layer_parts(model, layer).down.weight.data[:, list(neurons)] = 0


def test_dead_heads_and_neurons_go_and_no_output_changes(
    planted: Callable[..., Path], teacher: Teacher, train_csv: Path, tmp_path: Path
) -> None:
    dead = planted(teacher.folder, dead_parts)
    before = logits(opened(dead))
    record = prune(arguments(dead, tmp_path, {"heads": 3 / 16, "neurons": 48 / 256, "samples": 64}, train=train_csv))
    assert record["removed"]["after"] == {"heads": [4, 2, 4, 3], "neurons": [32, 64, 48, 64]}
    assert record["size"]["layer_structure"]["heads"] == [4, 2, 4, 3]
    after = opened(tmp_path / MODEL)
    torch.testing.assert_close(logits(after), before, rtol=1e-5, atol=1e-5)
    assert layer_parts(after, 1).query.weight.shape == (16, 32), "removed, not zero"
    assert record["size"]["parameters"] < sum(p.numel() for p in opened(dead).parameters())


def test_layers_that_do_nothing_are_the_ones_that_go(
    planted: Callable[..., Path], teacher: Teacher, train_csv: Path, tmp_path: Path
) -> None:
    def idle(model: Any) -> None:
        for number in (
            1,
            2,
        ):  # what a layer adds is almost nothing beside what it is given, which is normalized already
            parts = layer_parts(model, number)
            for part in (parts.output, parts.down):
                part.weight.data.zero_()
                part.bias.data.zero_()
            for norm in (
                layers_of(model)[number].attention.output.LayerNorm,
                layers_of(model)[number].output.LayerNorm,
            ):
                norm.weight.data.copy_(layers_of(model)[0].output.LayerNorm.weight.data)
                norm.bias.data.copy_(layers_of(model)[0].output.LayerNorm.bias.data)

    folder = planted(teacher.folder, idle)
    before = opened(folder)
    prune(arguments(folder, tmp_path, {"layers": 2, "samples": 64}, train=train_csv))
    after = opened(tmp_path / MODEL)
    assert json.loads((tmp_path / MODEL / "config.json").read_text())["num_hidden_layers"] == 2
    for number, old in enumerate((0, 3)):
        mine, theirs = layer_parts(after, number), layer_parts(before, old)
        assert torch.equal(mine.query.weight, theirs.query.weight)


def test_uniform_takes_as_many_from_each_layer(teacher: Teacher, train_csv: Path, tmp_path: Path) -> None:
    step = {"heads": 0.5, "neurons": 0.5, "uniform": True, "samples": 32}
    record = prune(arguments(teacher.folder, tmp_path, step, train=train_csv))
    assert record["removed"]["after"] == {"heads": [2] * 4, "neurons": [32] * 4}


def test_heads_neurons_and_layers_at_once_and_recovery_beside_the_teacher(
    teacher: Teacher, train_csv: Path, tmp_path: Path
) -> None:
    step = {"layers": 1, "heads": 0.25, "neurons": 0.25, "recover": RECOVER | {"teacher": True}, "samples": 64}
    record = prune(
        arguments(teacher.folder, tmp_path, step, train=train_csv, teacher=teacher.folder, answers=teacher.answers)
    )
    assert sum(record["removed"]["after"]["heads"]) == 9
    assert record["training"]["loss"] == {"hard": 0.5, "soft": 0.5, "temperature": 2.0}
    assert opened(tmp_path / MODEL).config.num_hidden_layers == 3


def test_layers_that_share_their_weights_lose_the_same_parts_and_stay_shared(
    planted: Callable[..., Path], teacher: Teacher, train_csv: Path, tmp_path: Path
) -> None:
    def shared_with_dead_head(model: Any) -> None:
        share_layers(model, [[0, 1], [2, 3]])
        layer_parts(model, 2).output.weight.data[:, 8:16] = 0

    folder = planted(teacher.folder, shared_with_dead_head)
    before = logits(opened(folder))
    record = prune(arguments(folder, tmp_path, {"heads": 1 / 8, "samples": 64}, train=train_csv))
    assert record["removed"]["after"]["heads"] == [4, 4, 3, 3]
    assert record["size"]["layer_structure"]["shares"] == [0, 0, 2, 2]
    torch.testing.assert_close(logits(opened(tmp_path / MODEL)), before, rtol=1e-5, atol=1e-5)


def test_each_place_of_a_shared_layer_is_ranked_by_what_it_does(
    planted: Callable[..., Path], teacher: Teacher, train_csv: Path, tmp_path: Path
) -> None:
    from pipelines.compress.steps.desk import open_desk

    folder = planted(teacher.folder, lambda model: share_layers(model, [[0, 1, 2, 3]]))
    found = importance(open_desk(arguments(folder, tmp_path, {}, train=train_csv)), 64)
    assert found.rows == 64
    assert (found.layers > 0).all()
    assert len(set(found.layers.tolist())) == 4
    assert all(torch.equal(found.heads[0], other) for other in found.heads)


def test_importance_without_labels_uses_the_models_own_answers(
    tmp_path: Path, model_folder: Callable[..., Path], teacher: Teacher
) -> None:
    from pipelines.compress.steps.desk import open_desk
    from tests.pipelines.compress.data import write_tags

    more = write_csv(tmp_path / "more.csv", [(text,) for text, _ in texts(40)], ["text"])
    tags = write_tags(tmp_path / "tags.jsonl", 40)
    bare = [{"tokens": json.loads(line)["tokens"]} for line in tags.read_text().splitlines()]
    tags.write_text("".join(json.dumps(row) + "\n" for row in bare))
    for folder, data, task in (
        (teacher.folder, more, "text-classification"),
        (model_folder("mpnet"), tags, "token-classification"),
        (model_folder("bert"), more, "feature-extraction"),
    ):
        found = importance(open_desk(arguments(folder, tmp_path, {}, unlabelled=data, task=task)), 32)
        assert all((values >= 0).all() and values.sum() > 0 for values in [*found.heads, *found.neurons]), task


@pytest.mark.parametrize(("share", "removed"), [(0.5, 6), (0.75, 9), (0.99, 9)])
def test_as_many_go_as_asked_and_one_of_each_layer_stays(share: float, removed: int) -> None:
    scores = [
        torch.tensor([0.1, 0.2, 0.3, 0.4]),
        torch.tensor([5.0, 6.0, 7.0, 8.0]),
        torch.tensor([0.5, 9.0, 1.0, 2.0]),
    ]
    found = lowest(scores, share, uniform=False)
    assert sum(map(len, found)) == removed
    assert 3 not in found[0]
    assert all(len(gone) < 4 for gone in found)
    if share == 0.5:
        assert found == [[0, 1, 2], [], [0, 2, 3]]


def test_neurons_stay_in_whole_vectors() -> None:
    scores = [torch.rand(64, generator=torch.Generator().manual_seed(1)) for _ in range(3)]
    assert {64 - len(gone) for gone in lowest(scores, 0.4, True, 16)} <= {32, 48}
    assert [len(gone) for gone in lowest([torch.rand(20)], 0.5, True, 16)] == [10], "a small layer is not rounded"


@pytest.mark.parametrize(
    ("kind", "step", "what", "parts"),
    [
        ("mpnet", {"heads": 0.5}, "heads of this model cannot be removed", ["mpnet", "relative position bias"]),
        (
            "deberta-v2",
            {"heads": 0.5},
            "the inside of this model is not known",
            ["DebertaV2", "'deberta-v2'", "roberta"],
        ),
        ("deberta-v2", {"sparsity": 0.5}, "the inside of this model is not known", ["DebertaV2", "distilbert"]),
        ("modernbert", {"layers": 1}, "the inside of this model is not known", ["ModernBert", "mpnet"]),
        ("bert-classifier", {"layers": 2}, "no layer would be left", ["2 of 2"]),
    ],
)
def test_what_cannot_be_pruned_is_told(
    kind: str, step: dict[str, Any], what: str, parts: list[str], model_folder: Callable[..., Path], tmp_path: Path,
    train_csv: Path,
) -> None:  # fmt: skip
    with pytest.raises(RequestError) as caught:
        prune(arguments(model_folder(kind), tmp_path, step, unlabelled=train_csv, task=KINDS[kind].task))
    assert what in caught.value.what
    told = f"{caught.value.value} {caught.value.remedy}"
    assert all(part in told for part in parts), told


def test_a_module_that_is_no_linear_layer_is_named(
    teacher: Teacher,
) -> None:
    model = opened(teacher.folder)
    layers_of(model)[2].output.dense = torch.nn.Identity()
    with pytest.raises(RequestError, match=r"no linear layer.*encoder\.layer\.2\.output\.dense of Bert"):
        layer_parts(model, 0)


def test_neurons_of_mpnet_can_go(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    from tests.pipelines.compress.data import opened, write_tags

    data = write_tags(tmp_path / "t.jsonl", 40)
    record = prune(
        arguments(
            model_folder("mpnet"), tmp_path, {"neurons": 0.5, "uniform": True}, train=data, task="token-classification"
        )
    )
    assert record["removed"]["after"]["neurons"] == [32, 32]
    assert opened(tmp_path / MODEL, "token-classification").config.intermediate_size == 32


@pytest.mark.parametrize("least", [1, 2])
def test_a_model_whose_vocabulary_was_cut_recovers_beside_its_teacher(
    least: int, teacher: Teacher, train_csv: Path, tmp_path: Path
) -> None:
    step = {"vocabulary": True, "min_count": least, "recover": RECOVER | {"teacher": True}}
    record = prune(
        arguments(teacher.folder, tmp_path, step, train=train_csv, teacher=teacher.folder, answers=teacher.answers)
    )
    assert record["removed"]["tokens_after"] < record["removed"]["tokens_before"]
    assert weights_of(tmp_path)["bert.embeddings.word_embeddings.weight"].shape[0] == record["removed"]["tokens_after"]
    assert record["training"]["loss"]["soft"] == 0.5


def test_states_are_matched_token_by_token_with_a_cut_vocabulary(
    teacher: Teacher, train_csv: Path, tmp_path: Path
) -> None:
    """The teacher is given its own ids: a model that only lost tokens has nothing to learn from it."""
    step = {"vocabulary": True, "recover": RECOVER | {"teacher": True, "max_steps": 20, "learning_rate": 1e-12,
            "dropout": 0, "loss": {"hard": 0, "soft": 0, "hidden": 1.0}}}  # fmt: skip
    record = prune(
        arguments(teacher.folder, tmp_path, step, train=train_csv, teacher=teacher.folder, answers=teacher.answers)
    )
    assert record["training"]["losses"][0]["loss"] < 1e-8


def test_models_of_other_kinds_lose_heads_and_open_again(tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    from exporter.structure import remove_heads, remove_neurons
    from exporter.structure.checkpoint import save_checkpoint

    for kind in ("distilbert", "vit", "bert"):
        task = KINDS[kind].task
        model = opened(model_folder(kind), task)
        remove_heads(model, 1, [1, 3])
        remove_neurons(model, 0, list(range(20)))
        out = make_model(kind, tmp_path / kind)
        save_checkpoint(model, out)
        again = opened(out, task)
        given = (
            {"pixel_values": torch.ones(1, 3, 32, 32)} if kind == "vit" else {"input_ids": torch.arange(8)[None] + 5}
        )
        with torch.no_grad():
            torch.testing.assert_close(again(**given)[0], model(**given)[0])
        assert layer_parts(again, 1).heads == 2


def test_what_one_step_pruned_a_later_one_leaves_zero(teacher: Teacher, train_csv: Path, tmp_path: Path) -> None:
    pruned, tuned = tmp_path / "pruned", tmp_path / "tuned"
    prune(arguments(teacher.folder, pruned, {"sparsity": 0.6}, train=train_csv))
    finetune(arguments(pruned / MODEL, tuned, {"max_steps": 8, "learning_rate": 1e-3}, train=train_csv))
    (before, _, old), (after, _, new) = zeros_of(pruned), zeros_of(tuned)
    assert after == before
    assert all(torch.equal(old[name] == 0, new[name] == 0) for name in old)
    assert any(not torch.equal(old[name], new[name]) for name in old), "it was trained"
