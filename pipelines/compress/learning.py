"""What a training minimises: the labels alone, or a teacher's answers and inner states as well."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from exporter.errors import RequestError
from exporter.structure import layer_parts, layers_of
from pipelines.compress import objectives
from pipelines.compress.examples import COUNTED, INDEX, OWN, SECOND, TARGET
from pipelines.compress.magnitude import bare
from pipelines.compress.sections import Loss

PROJECTIONS = "planish_projections"
"""Attribute of a student in training: what brings its hidden states to the teacher's width."""
_RELATION_HEADS = 12


@dataclass(frozen=True)
class Terms:
    """Weights of the terms of a loss, none of them open (see `Loss`)."""

    hard: float = 0.0
    soft: float = 0.0
    temperature: float = 2.0
    hidden: float = 0.0
    attention: float = 0.0
    relations: float = 0.0
    cosine: float = 0.0
    embedding: float = 0.0

    @property
    def inner(self) -> bool:
        """Whether the teacher has to run beside the student: its inner states are too large to keep."""
        return bool(self.hidden or self.attention or self.relations or self.cosine)

    @classmethod
    def of(cls, loss: Loss, task: str, *, labelled: bool, teacher: bool) -> Terms:
        """The terms of a recipe's loss; what it leaves open is as suits the task.

        Raises:
            RequestError: A term means nothing for the task.
        """
        encoder = task == "feature-extraction"
        if not teacher:
            if encoder and not labelled:
                remedy = "Give pairs with their scores (text, text_pair, score), or distil from a teacher"
                raise RequestError("a sentence encoder has nothing to learn from here", "texts alone", remedy)
            return cls(hard=1.0)
        if encoder and (loss.hard or loss.soft):
            raise RequestError(
                "a sentence encoder learns from its teacher's embeddings alone", "hard, soft", "Use embedding"
            )
        if not encoder and loss.embedding:
            raise RequestError("only sentence encoders have embeddings to learn from", task, "Leave out loss.embedding")
        given = loss.model_dump()
        matched = any(given[name] for name in ("hidden", "attention", "relations", "cosine"))
        usual = {
            "hard": 0.0 if encoder or not labelled else 0.5,
            "soft": 0.0 if encoder else 0.5 if labelled else 1.0,
            "embedding": 0.0 if not encoder or matched else 1.0,
        }
        terms = cls(**{name: usual[name] if value is None else value for name, value in given.items()})
        if not (terms.hard or terms.soft or terms.embedding or terms.inner):
            zero = ", ".join(name for name in usual if given[name] == 0)
            raise RequestError("there is nothing to learn from", f"loss: {zero} 0", "Give a term a weight above 0")
        return terms


@dataclass
class Answers:
    """What the teacher said of every row, kept from an earlier stage: logits, or embeddings; by the row's number."""

    values: Any

    def of(self, index: Any, device: Any) -> Any:
        return torch.from_numpy(self.values[index.cpu().numpy()]).to(device)


@dataclass
class Lesson:
    """The objective of a training (`pipelines.compress.training.Objective`).

    Attributes:
        terms: Weights.
        answers: Of the teacher, where logits or embeddings are learned.
        teacher: The model itself, where its inner states are.
        pool: From hidden states and mask to sentence embeddings.
        layer_map: For each student layer, the teacher's layer whose states it learns.
    """

    terms: Terms
    answers: Answers | None = None
    teacher: Any = None
    pool: Callable[[Any, Any], Any] | None = None
    layer_map: Sequence[int] = ()
    _watched: dict[str, Any] = field(default_factory=dict)
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def __call__(self, model: Any, batch: Mapping[str, Any], inputs: Mapping[str, Any]) -> tuple[Any, Any]:
        terms = self.terms
        how = {"output_hidden_states": bool(terms.hidden or terms.cosine), "output_attentions": bool(terms.attention)}
        outputs = model(**inputs, **{name: True for name, wanted in how.items() if wanted})
        total = torch.zeros((), device=next(iter(inputs.values())).device)
        if terms.hard and self.pool is not None:
            total = total + terms.hard * self._alike(model, batch, inputs, outputs)
        elif terms.hard or terms.soft:
            total = total + self._said(batch, inputs, outputs)
        if terms.embedding and self.answers is not None and self.pool is not None:
            mine = self._embedding(outputs, inputs["attention_mask"])
            theirs = self.answers.of(batch[INDEX], mine.device)
            if mine.shape != theirs.shape:
                told = f"{theirs.shape[-1]} and {mine.shape[-1]} numbers"
                raise RequestError(
                    "teacher and student have embeddings of different length",
                    told,
                    "Give the student the teacher's width",
                )
            total = total + terms.embedding * objectives.embeddings(mine, theirs)
        if self.teacher is not None and terms.inner:
            total = total + self._inner(model, batch, inputs, outputs, how)
        return total, outputs

    def _embedding(self, outputs: Any, mask: Any) -> Any:
        if isinstance(self.pool, nn.Module):
            self.pool.to(mask.device)
        return self.pool(outputs.last_hidden_state, mask)  # type: ignore[misc]

    def _alike(self, model: Any, batch: Mapping[str, Any], inputs: Mapping[str, Any], outputs: Any) -> Any:
        """What a sentence encoder learns from pairs whose likeness is known."""
        second = {name: batch[SECOND + name] for name in inputs}
        mine = self._embedding(outputs, inputs["attention_mask"])
        other = self._embedding(model(**second), second["attention_mask"])
        return objectives.likeness(mine, other, batch[TARGET])

    def _said(self, batch: Mapping[str, Any], inputs: Mapping[str, Any], outputs: Any) -> Any:
        """What is learned from labels and from the teacher's logits."""
        terms, mask = self.terms, inputs.get("attention_mask")
        logits, answering = objectives.logits_of(outputs, mask), "start_logits" in outputs
        total = torch.zeros((), device=logits.device)
        if terms.hard:
            target = objectives.placed(batch[TARGET], outputs, mask)
            total = total + terms.hard * objectives.hard_targets(logits, target)
        if terms.soft and self.answers is not None:
            theirs, counted = _fitted(self.answers.of(batch[INDEX], logits.device), mask), batch[COUNTED]
            if answering:
                theirs, counted = objectives.choices(theirs, mask), counted[:, None].expand(-1, 2)
            total = total + terms.soft * objectives.soft_targets(logits, theirs, counted, terms.temperature)
        return total / 2 if answering else total  # the mean over start and end

    def _inner(
        self, model: Any, batch: Mapping[str, Any], inputs: Mapping[str, Any], outputs: Any, how: Mapping[str, bool]
    ) -> Any:
        terms, mask = self.terms, _mask(inputs)
        self.teacher.to(mask.device)
        own = {name: batch[OWN + name] for name in inputs if OWN + name in batch}
        with torch.no_grad():
            theirs = self.teacher(**{**inputs, **own}, **{name: True for name, wanted in how.items() if wanted})
        total = torch.zeros((), device=mask.device)
        projections = getattr(bare(model), PROJECTIONS, ())
        if terms.hidden:
            pairs = [(0, 0), *((i + 1, j + 1) for i, j in enumerate(self.layer_map))]
            for projection, (i, j) in zip(projections, pairs, strict=True):
                mine, other = projection(outputs.hidden_states[i]), theirs.hidden_states[j]
                total = total + terms.hidden * objectives.hidden_states(mine, other, _tokens_of(mine, mask))
        if terms.cosine:
            mine, other = outputs.hidden_states[-1], theirs.hidden_states[-1]
            total = total + terms.cosine * objectives.cosine_hidden(mine, other, _tokens_of(mine, mask))
        if terms.attention:
            for i, j in enumerate(self.layer_map):
                mine, other = outputs.attentions[i], theirs.attentions[j]
                shown = _tokens_of(mine.transpose(1, 2), mask)
                total = total + terms.attention * objectives.attention_scores(mine, other, shown)
        if terms.relations:
            for name in ("query", "key", "value"):
                mine, other = self._watched[f"student.{name}"], self._watched[f"teacher.{name}"]
                heads = math.gcd(mine.shape[-1], other.shape[-1], _RELATION_HEADS)
                shown = _tokens_of(mine, mask)
                total = total + terms.relations * objectives.self_attention_relations(mine, other, shown, heads) / 3
        return total

    def prepare(self, student: Any) -> None:
        """Put what training needs into the student: projections to the teacher's width, and eyes on its last layer.

        Raises:
            RequestError: The inside of one of the two is not known.
        """
        if self.teacher is None or not self.terms.inner:
            return
        self.teacher.eval().requires_grad_(False)
        if self.terms.attention:
            was = student.config._attn_implementation
            self._undo.append(lambda: student.set_attn_implementation(was))
            for model in (student, self.teacher):
                model.set_attn_implementation("eager")  # other kernels keep no distribution
        mine, theirs = _width(student), _width(self.teacher)
        if self.terms.cosine and mine != theirs:
            raise RequestError(
                "the direction of hidden states needs equal widths", f"{theirs} and {mine}", "Use loss.hidden"
            )
        if self.terms.hidden:
            same = mine == theirs
            made = [
                nn.Identity() if same else nn.Linear(mine, theirs, bias=False) for _ in range(1 + len(self.layer_map))
            ]
            setattr(student, PROJECTIONS, nn.ModuleList(made))
        if self.terms.relations:
            for role, model in (("student", student), ("teacher", self.teacher)):
                parts = layer_parts(model, len(layers_of(model)) - 1)
                for name in ("query", "key", "value"):
                    handle = getattr(parts, name).register_forward_hook(self._eye(f"{role}.{name}"))
                    self._undo.append(handle.remove)

    def _eye(self, name: str) -> Callable[..., None]:
        def see(module: Any, given: Any, output: Any) -> None:
            self._watched[name] = output

        return see

    def finish(self, student: Any) -> None:
        """Take out of the student what `prepare` put in."""
        if hasattr(student, PROJECTIONS):
            delattr(student, PROJECTIONS)
        while self._undo:
            self._undo.pop()()
        self._watched.clear()


def usual_layer_map(student: int, teacher: int) -> list[int]:
    """For each student layer the teacher's layer at the end of its equal share: the first of 3 learns the second of 6
    (TinyBERT, section 4.2).

    >>> usual_layer_map(3, 6)
    [1, 3, 5]
    """
    return [max(0, round((i + 1) * teacher / student) - 1) for i in range(student)]


def _fitted(theirs: Any, mask: Any) -> Any:
    """Logits of tokens are kept from the row's first token on, padded to the longest row of all: here as in a batch."""
    if theirs.ndim != 3:
        return theirs
    place = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return theirs.gather(1, place[:, :, None].expand(-1, -1, theirs.shape[-1]))


def _mask(inputs: Mapping[str, Any]) -> Any:
    """Which tokens are attended to; of pictures one column of ones (see `_tokens_of`)."""
    if "attention_mask" in inputs:
        return inputs["attention_mask"]
    first = next(iter(inputs.values()))
    return torch.ones(first.shape[0], 1, dtype=torch.int64, device=first.device)


def _tokens_of(states: Any, mask: Any) -> Any:
    """The mask for states (rows, tokens, …): patches of a picture have none of their own and all count."""
    return mask if mask.shape[1] == states.shape[1] else mask[:, :1].expand(-1, states.shape[1])


def _width(model: Any) -> int:
    return int(getattr(model.config, "hidden_size", 0) or model.config.dim)
