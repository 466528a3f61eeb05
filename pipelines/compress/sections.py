"""The recipe's section `compress:`, as frozen and validated data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipelines.recipe_errors import Wrong
from pipelines.recipe_sections import Bool, Column, Count, Float, Name, Section

Share01 = Annotated[Float, Field(ge=0, lt=1)]
Weight = Annotated[Float, Field(ge=0)]


class Training(Section):
    """How a step trains. Through `transformers.Trainer`, whose defaults hold where nothing is said.

    Attributes:
        epochs: Passes over the training data; a part of one is allowed.
        max_steps: Optimizer steps at most; ends before `epochs` are through.
        batch_size: Rows per optimizer step, over all devices and accumulated parts: the result does not depend on how
            they are divided.
        micro_batch: Rows that a device takes at a time; the rest is accumulated. None: all of its share.
        learning_rate: At its peak.
        warmup: Share of the steps over which it rises.
        schedule: How it falls afterwards.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are scaled to this norm at most; 0: never.
        dropout: Probability in place of the model's own.
        precision: ``fp32``, or automatic mixed precision: ``bf16``, or ``fp16`` with loss scaling.
        gradient_checkpointing: Compute activations again instead of keeping them.
        max_length: Tokens at most; longer texts are cut.
        early_stopping: Evaluations without a better result after which it ends; needs `compress.validation`.
        evaluations: Per epoch, where there is validation data; the best of the models evaluated is kept.
        save_minutes: Minutes between checkpoints that an interrupted run goes on from.
    """

    epochs: Annotated[Float, Field(gt=0)] = 3.0
    max_steps: Count | None = None
    batch_size: Count = 32
    micro_batch: Count | None = None
    learning_rate: Annotated[Float, Field(gt=0)] = 5e-5
    warmup: Share01 = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: Weight = 0.01
    max_grad_norm: Weight = 1.0
    dropout: Share01 | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: Bool = False
    max_length: Count | None = None
    early_stopping: Count | None = None
    evaluations: Count = 1
    save_minutes: Annotated[Float, Field(gt=0)] = 5.0

    @model_validator(mode="after")
    def _divisible(self) -> Training:
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            remedy = f"It must divide batch_size, {self.batch_size}"
            raise Wrong("does not divide the batch", self.micro_batch, remedy, "micro_batch")
        return self


class Loss(Section):
    """What a student learns from its teacher: weights of the terms of the loss. All null: as suits the task.

    Attributes:
        hard: Cross-entropy with the labels.
        soft: Soft targets (see `pipelines.compress.objectives.soft_targets`).
        temperature: Of the soft targets.
        hidden: Mean squared error of hidden states, layer by layer, as in TinyBERT.
        attention: Mean squared error of attention scores, layer by layer, as in TinyBERT.
        relations: Self-attention relations of the last layer, as in MiniLM.
        cosine: Direction of the last hidden states, as in DistilBERT.
        embedding: Sentence embeddings: what a sentence encoder's student learns.
    """

    hard: Weight | None = None
    soft: Weight | None = None
    temperature: Annotated[Float, Field(gt=0)] = 2.0
    hidden: Weight = 0.0
    attention: Weight = 0.0
    relations: Weight = 0.0
    cosine: Weight = 0.0
    embedding: Weight | None = None

    @model_validator(mode="after")
    def _something(self) -> Loss:
        terms = (self.hard, self.soft, self.hidden, self.attention, self.relations, self.cosine, self.embedding)
        if None not in terms and not any(terms):
            raise Wrong("there is nothing to learn from", 0, "Give one of the terms a weight above 0")
        return self


class Finetune(Training):
    """Ordinary supervised training on the labels of `compress.data`."""


class Distil(Training):
    """Train a smaller student to do what its teacher does.

    Attributes:
        teacher: A checkpoint (as `source`); none: the model that enters the step.
        layers: The student is the teacher with so many of its layers, evenly spread, or with those that are listed.
        config: The student is new, of the teacher's configuration with these fields changed.
        student: The student is this checkpoint.
        loss: What it learns from.
    """

    teacher: Name | None = None
    layers: Count | tuple[Annotated[int, Field(ge=0)], ...] | None = None
    config: dict[str, Any] = Field(default={})
    student: Name | None = None
    loss: Loss = Loss()

    @model_validator(mode="after")
    def _one_student(self) -> Distil:
        given = [name for name in ("layers", "config", "student") if getattr(self, name)]
        if len(given) > 1:
            raise Wrong("the student is described more than once", ", ".join(given), "Keep one of them")
        if not given and self.teacher is None:
            raise Wrong("the student would be its own teacher", "no layers", "Give layers, config, student or teacher")
        return self


class Recover(Training):
    """Training that follows a removal. It learns from the labels, and from the teacher where there is one.

    Attributes:
        teacher: Learn from the model that was there before compression, too.
        loss: What it learns from.
    """

    epochs: Annotated[Float, Field(gt=0)] = 1.0
    teacher: Bool = True
    loss: Loss = Loss()

    @model_validator(mode="after")
    def _from_whom(self) -> Recover:
        terms = ("soft", "hidden", "attention", "relations", "cosine", "embedding")
        asked = [name for name in terms if getattr(self.loss, name)]
        if asked and not self.teacher:
            raise Wrong("there is no teacher to learn this from", ", ".join(asked), "Set teacher to true", "loss")
        return self


def _unquoted(value: Any) -> Any:
    """YAML reads 2:4 without quotes as a number to the base of 60."""
    return "2:4" if value == 2 * 60 + 4 and not isinstance(value, bool) else value


class Prune(Section):
    """Remove what matters least. One kind a step: weights, or heads, neurons and layers, or tokens.

    Attributes:
        sparsity: Share of the layers' weights to set to zero, the smallest first.
        scope: Whether weights are compared in the whole model or in each matrix by itself.
        pattern: ``2:4``: two of every four weights of a row, which sparse tensor cores run faster.
        gradual: Do it in so many parts with training between (needs `recover`).
        heads: Share of the attention heads to remove.
        neurons: Share of the feed-forward neurons to remove.
        layers: Number of layers to remove.
        uniform: Remove as many heads and neurons from each layer, instead of the least important of the model.
        samples: Rows that importance is measured on.
        vocabulary: Remove the tokens that the data do not use.
        min_count: Tokens that occur more seldom count as unused.
        recover: Training afterwards.
    """

    sparsity: Annotated[Float, Field(gt=0, lt=1)] | None = None
    scope: Literal["global", "layer"] = "global"
    pattern: Annotated[Literal["2:4"] | None, BeforeValidator(_unquoted)] = None
    gradual: Count = 1
    heads: Share01 = 0.0
    neurons: Share01 = 0.0
    layers: Annotated[int, Field(ge=0)] = 0
    uniform: Bool = False
    samples: Count = 512
    vocabulary: Bool = False
    min_count: Count = 1
    recover: Recover | None = None

    @property
    def kind(self) -> Literal["weights", "structure", "vocabulary"]:
        if self.vocabulary:
            return "vocabulary"
        return "weights" if self.sparsity is not None or self.pattern else "structure"

    @model_validator(mode="after")
    def _one_kind(self) -> Prune:
        kinds = {
            "sparsity": self.sparsity is not None,
            "pattern": self.pattern is not None,
            "heads, neurons or layers": bool(self.heads or self.neurons or self.layers),
            "vocabulary": self.vocabulary,
        }
        given = [name for name, there in kinds.items() if there]
        if len(given) != 1:
            told = ", ".join(given) or "nothing"
            raise Wrong("a pruning step does one thing", told, f"Give one of: {', '.join(kinds)}")
        if self.gradual > 1 and (self.kind != "weights" or self.recover is None):
            raise Wrong("gradual pruning sets weights to zero while it trains", self.gradual, "Add recover", "gradual")
        return self


class ShareStep(Section):
    """Let parts of the model use the same weights.

    Attributes:
        layers: Groups of layers, each of which uses the weights of its first, or the number of groups of neighbours.
        embeddings: The output layer of a language model uses the weights of the input embedding.
        clusters: Values that each weight matrix may have (k-means).
        recover: Training afterwards.
    """

    layers: Count | tuple[tuple[Annotated[int, Field(ge=0)], ...], ...] | None = None
    embeddings: Bool = False
    clusters: Annotated[int, Field(ge=2, le=256)] | None = None
    recover: Recover | None = None

    @model_validator(mode="after")
    def _something(self) -> ShareStep:
        if not self.layers and not self.embeddings and self.clusters is None:
            raise Wrong("there is nothing to share", "no key", "Give layers, embeddings or clusters")
        return self


class Step(Section):
    """One step: exactly one of the four."""

    finetune: Finetune | None = None
    distil: Distil | None = None
    prune: Prune | None = None
    share: ShareStep | None = None

    @property
    def kind(self) -> str:
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def asked(self) -> Finetune | Distil | Prune | ShareStep:
        found: Finetune | Distil | Prune | ShareStep = getattr(self, self.kind)
        return found

    @property
    def training(self) -> Training | None:
        """How it trains, where it does."""
        asked = self.asked
        return asked if isinstance(asked, Training) else asked.recover

    @model_validator(mode="before")
    @classmethod
    def _named_alone(cls, value: Any) -> Any:
        """``- finetune:`` with nothing below it means its defaults, as ``- finetune`` does."""
        if isinstance(value, str):
            value = {value: {}}
        if isinstance(value, dict):
            return {key: {} if below is None else below for key, below in value.items()}
        return value

    @model_validator(mode="after")
    def _one(self) -> Step:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            remedy = "Each item of the list is one of finetune, distil, prune and share"
            raise Wrong("not a step", ", ".join(given) or "empty", remedy)
        return self


class Compress(Section):
    """Make the model smaller before it is exported: steps, each with a model in and a model out.

    Attributes:
        steps: In their order.
        data: Path of the training data, read as evaluation data are.
        columns: As in `data`; where none are given those of `data`.
        split: Split of a `datasets` folder.
        limit: Rows taken at most, drawn evenly at random by the recipe's seed.
        validation: Path of the data that training is judged on while it goes: never those of `data.evaluation`.
        unlabelled: Path of further texts that a student learns its teacher's answers to.
        labels: Class names in the order of the new head; none: those of the data, sorted.
        max_drop: Points of the task metric that the compressed model may lose against the model before compression.
        max_drop_worst: At the bad end of the interval; none: twice `max_drop`.
        sha256: Digests of the files (filled in by `Recipe.resolved`).
    """

    steps: tuple[Step, ...] = ()
    data: Name | None = None
    columns: dict[Name, Column] = Field(default={})
    split: Name | None = None
    limit: Count | None = None
    validation: Name | None = None
    unlabelled: Name | None = None
    labels: tuple[Name, ...] = ()
    max_drop: Weight = 2.0
    max_drop_worst: Weight | None = None
    sha256: dict[Name, str] = Field(default={})

    @field_validator("labels")
    @classmethod
    def _different(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        from pipelines.recipe_sections import no_twice

        return no_twice(labels)

    @model_validator(mode="after")
    def _complete(self) -> Compress:
        if not self.steps:
            return self
        for step in self.steps:
            needs = "trains" if step.training is not None else "measures importance" if _measures(step) else ""
            if needs and self.data is None and self.unlabelled is None:
                raise Wrong(f"a step {needs}, and there is no data", step.kind, "Give compress.data", "data")
            if step.finetune is not None and self.data is None:
                raise Wrong("finetune needs labelled data", "only unlabelled", "Give compress.data", "data")
            if step.training is not None and step.training.early_stopping and self.validation is None:
                patience, remedy = step.training.early_stopping, "Give compress.validation"
                raise Wrong("early stopping needs data to judge by", patience, remedy, "validation")
        if self.max_drop_worst is not None and self.max_drop_worst < self.max_drop:
            remedy = f"It must be at least max_drop, {self.max_drop}"
            raise Wrong("out of range", self.max_drop_worst, remedy, "max_drop_worst")
        return self


def _measures(step: Step) -> bool:
    return step.prune is not None and (
        step.prune.kind == "vocabulary" or bool(step.prune.heads or step.prune.neurons or step.prune.layers)
    )
