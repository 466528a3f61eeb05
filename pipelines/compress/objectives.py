"""What a student is trained on, as losses that are minimised. Each is a sum over what counts, so that accumulated
parts of a batch, divided by the number that the whole of it has, give exactly the mean over the batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100
_NO_CHOICE = -1e4
"""A logit whose probability is 0 in FP32; the difference of two such is one."""


def logits_of(outputs: Any, mask: Tensor | None) -> Tensor:
    """What a model says, float (rows, classes) or (rows, tokens, classes); of a model that answers questions its start
    and end logits, (rows, 2, tokens): two choices between the tokens, of which those of padding are none.

    Args:
        outputs: Of a `transformers` model.
        mask: (rows, tokens): 1 where a token is attended to.
    """
    if "start_logits" not in outputs:
        return outputs.logits
    return choices(torch.stack([outputs.start_logits, outputs.end_logits], dim=-1), mask)


def choices(by_token: Tensor, mask: Tensor | None) -> Tensor:
    """Start and end logits by token, (rows, tokens, 2), as `logits_of` gives them."""
    both = by_token.float().transpose(1, 2)
    return both if mask is None else both.masked_fill(mask[:, None] == 0, _NO_CHOICE)


def placed(target: Tensor, outputs: Any, mask: Tensor | None) -> Tensor:
    """Targets for `logits_of`: those of an answer number the tokens of their row, those of the batch also padding."""
    if "start_logits" not in outputs or mask is None:
        return target
    return torch.where(target == IGNORED, target, target + mask.argmax(dim=1, keepdim=True))


def hard_targets(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with the labels, summed.

    Args:
        logits: float (rows, classes), (rows, tokens, classes) or (rows, 2, tokens).
        target: int64 (rows,), (rows, tokens) or (rows, 2); -100 where there is no label.
    """
    return functional.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), target.reshape(-1), ignore_index=IGNORED, reduction="sum"
    )


def soft_targets(student: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Tensor:
    """``T² · KL(teacher ‖ student)`` of the distributions at temperature ``T``, summed over what counts.

    G. Hinton, O. Vinyals and J. Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2. They minimise
    the cross-entropy ``-Σ p_teacher log p_student``, whose gradient is that of the divergence; the factor ``T²`` keeps
    the gradients' size as the temperature changes.

    Args:
        student: Logits, float (rows, classes), (rows, tokens, classes) or (rows, 2, tokens).
        teacher: Logits of the same shape.
        counted: int64 (rows,), (rows, tokens) or (rows, 2); -100 where a position does not count.
        temperature: ``T``.
    """
    log_student = functional.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = functional.log_softmax(teacher.float() / temperature, dim=-1)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)
    return temperature**2 * divergence[counted != IGNORED].sum()


def hidden_states(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error between hidden states at the tokens that are attended to, summed over rows.

    X. Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", 2020, equation 8; a student of
    another width is projected first.

    Args:
        student: float (rows, tokens, width), projected.
        teacher: The same.
        mask: (rows, tokens): 1 where a token is attended to.
    """
    weights = mask.to(torch.float32)
    errors = (student.float() - teacher.float()).square().mean(dim=-1) * weights
    return (errors.sum(dim=-1) / weights.sum(dim=-1).clamp(min=1)).sum()


def attention_scores(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error between attention distributions, summed over rows.

    TinyBERT (see `hidden_states`), equation 7, on distributions instead of scores before the softmax, which
    `transformers` does not give. Both are averaged over heads first where their numbers differ.

    Args:
        student: float (rows, heads, tokens, tokens).
        teacher: The same, with heads of its own number.
        mask: (rows, tokens).
    """
    mine, theirs = student.float(), teacher.float()
    if mine.shape[1] != theirs.shape[1]:
        mine, theirs = mine.mean(dim=1, keepdim=True), theirs.mean(dim=1, keepdim=True)
    weights = mask.to(torch.float32)
    pairs = weights[:, None, :, None] * weights[:, None, None, :]
    errors = ((mine - theirs).square() * pairs).mean(dim=1)
    return (errors.sum(dim=(1, 2)) / weights.sum(dim=-1).clamp(min=1)).sum()


def self_attention_relations(student: Tensor, teacher: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Divergence between the relations of one projection (queries, keys or values) of student and teacher, summed over
    rows: ``KL(softmax(T Tᵀ / √d) ‖ softmax(S Sᵀ / √d))``, mean over relation heads and tokens.

    W. Wang et al., "MiniLM: Deep Self-Attention Distillation", 2020, and "MiniLMv2: Multi-Head Self-Attention Relation
    Distillation", 2021, equations 3 to 6: with a number of relation heads of its own, student and teacher need not be
    of the same width nor have as many heads.

    Args:
        student: The projection's output, float (rows, tokens, width).
        teacher: The same; another width is allowed.
        mask: (rows, tokens).
        heads: Relation heads; divides both widths.
    """
    weights = mask.to(torch.float32)
    log_student, log_teacher = _log_relations(student, mask, heads), _log_relations(teacher, mask, heads)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).masked_fill(mask[:, None, None, :] == 0, 0.0)
    by_token = divergence.sum(dim=-1).mean(dim=1) * weights
    return (by_token.sum(dim=-1) / weights.sum(dim=-1).clamp(min=1)).sum()


def cosine_hidden(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """``1 - cosine`` between last hidden states at the tokens that are attended to, mean over tokens, summed over rows.

    V. Sanh et al., "DistilBERT, a distilled version of BERT", 2019, section 3.

    Args:
        student: float (rows, tokens, width).
        teacher: The same.
        mask: (rows, tokens).
    """
    weights = mask.to(torch.float32)
    apart = (1 - functional.cosine_similarity(student.float(), teacher.float(), dim=-1)) * weights
    return (apart.sum(dim=-1) / weights.sum(dim=-1).clamp(min=1)).sum()


def likeness(first: Tensor, second: Tensor, score: Tensor) -> Tensor:
    """Squared difference between the cosine of two sentence embeddings and their score, summed over pairs.

    N. Reimers and I. Gurevych, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks", 2019, section 3: the
    regression objective.

    Args:
        first: float (pairs, width).
        second: The same.
        score: float (pairs,): the cosine that they are to have.
    """
    return (functional.cosine_similarity(first.float(), second.float(), dim=-1) - score).square().sum()


def embeddings(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error between sentence embeddings, times their width: squared distance, summed over rows.

    N. Reimers and I. Gurevych, "Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation",
    2020, equation 1.

    Args:
        student: float (rows, width).
        teacher: The same.
    """
    return (student.float() - teacher.float()).square().sum()


def _log_relations(projected: Tensor, mask: Tensor, heads: int) -> Tensor:
    rows, tokens, width = projected.shape
    parts = projected.float().view(rows, tokens, heads, width // heads).transpose(1, 2)
    scores = parts @ parts.transpose(-1, -2) / math.sqrt(width // heads)
    blocked = torch.finfo(torch.float32).min
    return functional.log_softmax(scores.masked_fill(mask[:, None, None, :] == 0, blocked), dim=-1)
