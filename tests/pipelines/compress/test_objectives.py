"""The losses against their definitions, written out in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipelines.compress import objectives

T = 3.0
LENGTHS = (7, 4, 1)
MASK = torch.tensor([[1] * length + [0] * (7 - length) for length in LENGTHS])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(heads: int, seed: int) -> Tensor:
    """Distributions over what is attended to, as a softmax with a mask gives them."""
    scores = randn(3, heads, 7, 7, seed=seed).masked_fill(MASK[:, None, None, :] == 0, float("-inf"))
    return scores.softmax(dim=-1)


def test_soft_targets_are_the_definition_in_float64() -> None:
    student, teacher = randn(5, 4, seed=1), randn(5, 4, seed=2)
    expected = 0.0
    for mine, theirs in zip(student.double().numpy() / T, teacher.double().numpy() / T, strict=True):
        p, q = np.exp(theirs) / np.exp(theirs).sum(), np.exp(mine) / np.exp(mine).sum()
        expected += T**2 * float((p * np.log(p / q)).sum())
    found = objectives.soft_targets(student, teacher, torch.zeros(5, dtype=torch.int64), T)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_soft_targets_are_torchs_divergence_of_teacher_and_student_in_this_order() -> None:
    student, teacher = randn(5, 4, seed=1), randn(5, 4, seed=2)
    theirs = functional.kl_div(
        (student / T).log_softmax(-1), (teacher / T).log_softmax(-1), reduction="sum", log_target=True
    )
    found = objectives.soft_targets(student, teacher, torch.zeros(5, dtype=torch.int64), T)
    assert float(found) == pytest.approx(T**2 * float(theirs), rel=1e-6)
    swapped = objectives.soft_targets(teacher, student, torch.zeros(5, dtype=torch.int64), T)
    assert float(swapped) != pytest.approx(float(found), rel=1e-2)


def test_soft_targets_have_the_gradient_of_the_cross_entropy_with_its_minus_sign() -> None:
    teacher = randn(5, 4, seed=2).double()
    mine, other = (randn(5, 4, seed=1).double().requires_grad_() for _ in range(2))
    objectives.soft_targets(mine, teacher, torch.zeros(5, dtype=torch.int64), T).backward()
    (-(T**2) * ((teacher / T).softmax(-1) * (other / T).log_softmax(-1)).sum()).backward()
    assert mine.grad is not None
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_soft_targets_keep_the_size_of_the_gradient_as_the_temperature_grows() -> None:
    """For large T the gradient of centred logits tends to (student - teacher) / classes (Hinton et al., equation 4)."""
    student = randn(6, 4, seed=1) * 0.1
    teacher = randn(6, 4, seed=2) * 0.1
    student, teacher = student - student.mean(-1, keepdim=True), teacher - teacher.mean(-1, keepdim=True)
    for temperature in (10.0, 40.0):
        mine = student.clone().requires_grad_()
        objectives.soft_targets(mine, teacher, torch.zeros(6, dtype=torch.int64), temperature).backward()
        torch.testing.assert_close(mine.grad, (student - teacher) / 4, rtol=0.05, atol=1e-3)


def test_what_does_not_count_adds_neither_loss_nor_gradient() -> None:
    student, teacher = randn(2, 3, 4, seed=1).requires_grad_(), randn(2, 3, 4, seed=2)
    counted = torch.tensor([[0, -100, 0], [-100, -100, 0]])
    target = torch.tensor([[1, -100, 3], [-100, -100, 0]])
    alone = [(0, 0), (0, 2), (1, 2)]
    for loss, each in (
        (
            objectives.soft_targets(student, teacher, counted, T),
            [
                objectives.soft_targets(student[i, j][None], teacher[i, j][None], counted[i, j][None], T)
                for i, j in alone
            ],
        ),
        (
            objectives.hard_targets(student, target),
            [functional.cross_entropy(student[i, j], target[i, j]) for i, j in alone],
        ),
    ):
        assert float(loss.detach()) == pytest.approx(sum(float(one.detach()) for one in each), rel=1e-6)
        (gradient,) = torch.autograd.grad(loss, student)
        assert gradient[counted == -100].abs().max() == 0
        assert gradient[counted != -100].abs().min() > 0


def test_hard_targets_without_any_label_are_zero_and_no_nan() -> None:
    student = randn(2, 4).requires_grad_()
    loss = objectives.hard_targets(student, torch.full((2,), -100))
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert student.grad is not None
    assert not student.grad.any()


INNER: dict[str, tuple[Callable[[int], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "hidden": (lambda seed: randn(3, 7, 12, seed=seed), objectives.hidden_states),
    "attention": (lambda seed: attention(4, seed), objectives.attention_scores),
    "relations": (
        lambda seed: randn(3, 7, 12, seed=seed),
        lambda a, b, mask: objectives.self_attention_relations(a, b, mask, 4),
    ),
    "cosine": (lambda seed: randn(3, 7, 12, seed=seed), objectives.cosine_hidden),
}


@pytest.mark.parametrize("name", INNER)
def test_matching_equal_states_costs_nothing(name: str) -> None:
    make, loss = INNER[name]
    assert float(loss(make(1), make(1), MASK)) == pytest.approx(0.0, abs=1e-5)
    assert float(loss(make(1), make(2), MASK)) > 0.01


@pytest.mark.parametrize("name", INNER)
def test_a_batch_costs_the_sum_of_its_rows_without_their_padding(name: str) -> None:
    """What accumulating parts of a batch needs; and padding, whatever is in it, changes nothing."""
    make, loss = INNER[name]
    student, teacher = make(1), make(2)
    together = float(loss(student, teacher, MASK))

    def cut(states: Tensor, row: int) -> Tensor:
        length = LENGTHS[row]
        return states[row : row + 1, :, :length, :length] if name == "attention" else states[row : row + 1, :length]

    rows = [loss(cut(student, i), cut(teacher, i), torch.ones(1, n)) for i, n in enumerate(LENGTHS)]
    assert together == pytest.approx(sum(map(float, rows)), rel=1e-5)
    where = (MASK == 0)[:, None, :, None] if name == "attention" else (MASK == 0)[:, :, None]
    assert float(loss(student.masked_fill(where, 9.0), teacher, MASK)) == pytest.approx(together, rel=1e-6)


@pytest.mark.parametrize("name", INNER)
def test_padding_gets_no_gradient(name: str) -> None:
    make, loss = INNER[name]
    student = make(1).requires_grad_()
    loss(student, make(2), MASK).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    padding = (MASK == 0)[:, None, :, None] if name == "attention" else (MASK == 0)[:, :, None]
    assert student.grad.masked_select(padding).abs().sum() == 0


def test_hidden_states_are_the_mean_over_tokens_and_width() -> None:
    student, teacher = randn(3, 7, 12, seed=1).double(), randn(3, 7, 12, seed=2).double()
    expected = sum(float((student[i, :n] - teacher[i, :n]).square().mean()) for i, n in enumerate(LENGTHS))
    assert float(objectives.hidden_states(student, teacher, MASK)) == pytest.approx(expected, rel=1e-6)


def test_attention_of_other_numbers_of_heads_is_compared_by_its_mean() -> None:
    four, two = attention(4, 1), attention(2, 2)
    expected = objectives.attention_scores(four.mean(1, keepdim=True), two.mean(1, keepdim=True), MASK)
    assert float(objectives.attention_scores(four, two, MASK)) == pytest.approx(float(expected), rel=1e-6)


def test_relations_are_the_definition_and_take_other_widths() -> None:
    student, teacher = randn(1, 5, 8, seed=1).double(), randn(1, 5, 16, seed=2).double()
    expected = 0.0
    for head in range(4):
        mine, theirs = student[0, :, head * 2 : head * 2 + 2], teacher[0, :, head * 4 : head * 4 + 4]
        p, q = ((x @ x.T / x.shape[1] ** 0.5).softmax(-1) for x in (theirs, mine))
        expected += float((p * (p / q).log()).sum(-1).mean()) / 4
    found = objectives.self_attention_relations(student, teacher, torch.ones(1, 5), 4)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_embeddings_cost_their_squared_distance_summed_over_rows() -> None:
    student, teacher = randn(3, 6, seed=1), randn(3, 6, seed=2)
    assert float(objectives.embeddings(student, student)) == 0.0
    rows = [objectives.embeddings(student[i : i + 1], teacher[i : i + 1]) for i in range(3)]
    assert float(objectives.embeddings(student, teacher)) == pytest.approx(sum(map(float, rows)), rel=1e-6)
    assert float(rows[0]) == pytest.approx(float((student[0] - teacher[0]).double().square().sum()), rel=1e-6)
