"""Compression in a run: each step a stage of its own, from the source to the model that is exported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import EnvironmentLackError, RequestError
from exporter.sources import Source, resolve_source
from exporter.tasks import Task, check_task, get_task
from pipelines.cache import TRAINING
from pipelines.compress.models import HEADS, MODEL, TRAINABLE, needs_head, opened, refuse_other_order
from pipelines.compress.sections import Compress, Distil, Recover, Step
from pipelines.disk import remove_tree
from pipelines.recipe import data_format
from pipelines.workshop import TORCH

if TYPE_CHECKING:
    from pipelines.recipe import Recipe
    from pipelines.workshop import Workshop

PACKAGES = (*TORCH, "accelerate", "numpy")
FUNCTIONS = {
    "finetune": "pipelines.compress.steps.finetune:finetune",
    "distil": "pipelines.compress.steps.distil:distil",
    "prune": "pipelines.compress.steps.prune:prune",
    "share": "pipelines.compress.steps.share:share",
}
_TITLES = {"finetune": "Fine-tune", "distil": "Distil", "prune": "Prune", "share": "Share weights"}


@dataclass(frozen=True)
class Hop:
    """A model on the way: the source, or what a step left.

    Attributes:
        name: ``source``, or number and kind of the step: ``2-distil``.
        title: For people: ``distilled into 3 layers``.
        kind: Of the step; ``source`` for the source.
        source: The model.
        record: Of the step: what it did, what the model costs.
        seconds: Time that making it took.
    """

    name: str
    title: str
    kind: str
    source: Source
    record: dict[str, Any]
    seconds: float = 0.0


@dataclass(frozen=True)
class Compressed:
    """All models on the way, the first of which compression began with, and the last of which is exported.

    Attributes:
        hops: In order; the source only where it does the task already and no step fine-tunes it.
        teacher: Name of the one that all others are compared with: the fine-tuned model, else the source.
    """

    hops: tuple[Hop, ...]
    teacher: str

    @property
    def source(self) -> Source:
        return self.hops[-1].source


def compress(shop: Workshop, recipe: Recipe, resolved: Mapping[str, Any], source: Source) -> Compressed:
    """Run the recipe's steps.

    Args:
        shop: Runs and keeps stages.
        recipe: Has steps.
        resolved: The recipe resolved: digests of the data.
        source: What the first step begins with.

    Raises:
        RequestError: Steps, data, labels or teachers do not fit the model.
        EnvironmentLackError: What training needs is missing.
    """
    asked, task = recipe.compress, get_task(str(recipe.task))
    if any(step.training is not None for step in asked.steps):
        _need_accelerate()
    if task.name not in TRAINABLE and any(step.finetune is not None for step in asked.steps):
        remedy = f"Name the task that it is to learn: task: {' or '.join(TRAINABLE)}"
        raise RequestError("this task cannot be fine-tuned here", task.name, remedy)
    if asked.labels and task.name not in HEADS:
        raise RequestError("the task has no classes to name", task.name, "Leave out compress.labels")
    work = _Work(shop, recipe, asked, task, dict(resolved["compress"]["sha256"]))
    now, new_head = work.headed(source)
    hops = [] if new_head else [Hop("source", "the source", "source", now, {})]
    teaching = _teaching(asked.steps)
    teacher = hops[0] if hops and teaching is None else None
    for number, step in enumerate(asked.steps, start=1):
        hop = work.step(number, step, now, teacher.source if teacher is not None else None)
        now = hop.source
        if number == teaching:
            teacher = hop
        # Before the first fine-tuning a new head is random.
        if not new_head or number >= (teaching or 1):
            hops.append(hop)
    if teacher is None or not hops:  # a head is new only where a step fine-tunes
        raise RequestError("there is no model to compare with", recipe.source, "Fine-tune it first")
    if teaching is not None and hops[0].kind == "source":
        hops.pop(0)
    return Compressed(tuple(hops), teacher.name)


def _teaching(steps: Sequence[Step]) -> int | None:
    """The number of the step whose model all are compared with: the last fine-tuning of the first ones in a row."""
    kinds = [step.kind for step in steps]
    if "finetune" not in kinds:
        return None
    number = kinds.index("finetune")
    while number < len(kinds) and kinds[number] == "finetune":
        number += 1
    return number


@dataclass(frozen=True)
class _Work:
    shop: Workshop
    recipe: Recipe
    asked: Compress
    task: Task
    digests: Mapping[str, str]

    def headed(self, source: Source) -> tuple[Source, bool]:
        """The source, with a new head for the task's classes where it has none and a step trains one."""
        labels: tuple[str, ...] = self.asked.labels
        if self.asked.data is None or all(step.finetune is None for step in self.asked.steps):
            try:
                check_task(source, self.task)
            except RequestError as error:
                if self.task.name not in TRAINABLE:
                    raise
                remedy = "Begin with a step finetune, or name a source that was fine-tuned"
                raise RequestError(error.what, error.value, remedy) from error
            refuse_other_order(source, labels)
            return source, False
        from calibration.datasets import load_task_dataset
        from pipelines.compress.examples import label_names

        if not needs_head(source, self.task, labels):
            return source, False
        data = load_task_dataset(self.task.name, self.asked.data, columns=self._columns(), split=self.asked.split)
        if not data.labelled:
            told = f"{data.origin} has {', '.join(data.roles)}"
            raise RequestError("the training data have no labels", told, "Name their column with compress.columns")
        labels = label_names(data, labels) if self.task.name in HEADS else ()
        made = self.shop.make(
            "compress-head",
            f"Give the model a head for {f'{len(labels)} classes' if labels else 'answers'}",
            "pipelines.compress.steps.finetune:head",
            {"source": source.to_dict(), "task": self.task.name, "labels": list(labels), "seed": self.recipe.seed},
            inputs={"source": source.digest, "task": self.task.name, "labels": list(labels), "seed": self.recipe.seed},
            packages=TORCH,
        )
        return opened(made.folder, source.name), True

    def step(self, number: int, step: Step, entering: Source, teacher: Source | None) -> Hop:
        kind, asked = step.kind, step.asked
        training = step.training
        source, teacher = self._who(step, entering, teacher)
        learns = isinstance(training, Distil | Recover) and teacher is not None
        max_length = training.max_length if training is not None else None
        answers, answers_id = self._answers(teacher, max_length) if learns and teacher is not None else (None, None)
        settings = asked.model_dump(mode="json")
        inputs = {
            "source": source.digest,
            "task": self.task.name,
            "step": learned(settings),
            "data": self._data_id(),
            "teacher": teacher.digest if learns and teacher is not None else None,
            "answers": answers_id,
            "seed": self.recipe.seed,
            "metric": self.recipe.quality.metric,
        }
        name = f"compress-{kind}"
        key = self.shop.key(name, FUNCTIONS[kind], inputs=inputs, packages=PACKAGES)
        checkpoints = self.shop.cache.root / TRAINING / key.id
        title = f"{_TITLES[kind]} ({number} of {len(self.asked.steps)})"
        if training is not None:
            self._note(checkpoints, kind, source, settings)
        made = self.shop.make(
            name,
            title,
            FUNCTIONS[kind],
            {
                "source": source.to_dict(),
                "task": self.task.name,
                "step": settings,
                "data": self._data(),
                "teacher": teacher.to_dict() if learns and teacher is not None else None,
                "answers": answers,
                "checkpoints": str(checkpoints),
                "seed": self.recipe.seed,
                "metric": self.recipe.quality.metric,
            },
            inputs=inputs,
            packages=PACKAGES,
        )
        remove_tree(checkpoints)  # what was trained is safe now
        record = {"kind": kind, "asked": settings, **made.record}
        return Hop(
            f"{number}-{kind}", describe(record), kind, opened(made.folder, entering.name), record, self._seconds()
        )

    def _seconds(self) -> float:
        return float(self.shop.timeline[-1]["seconds"]) if self.shop.timeline else 0.0

    def _who(self, step: Step, entering: Source, teacher: Source | None) -> tuple[Source, Source | None]:
        """What a step works on, and whom it learns from."""
        if step.distil is not None:
            named = self._resolved(step.distil.teacher) if step.distil.teacher else entering
            if step.distil.student:
                return self._resolved(step.distil.student), named
            return named if step.distil.layers or step.distil.config else entering, named
        recover = step.training
        wanted = isinstance(recover, Recover) and recover.teacher
        return entering, teacher if wanted else None

    def _resolved(self, named: str) -> Source:
        found = resolve_source(named, trust=self.recipe.trust, trust_remote_code=self.recipe.trust_remote_code)
        check_task(found, self.task)
        refuse_other_order(found, self.asked.labels)
        return found

    def _answers(self, teacher: Source, max_length: int | None) -> tuple[str, str]:
        """The folder of a teacher's answers to every row, and what identifies them."""
        inputs = {"teacher": teacher.digest, "task": self.task.name, "data": self._data_id(), "max_length": max_length}
        made = self.shop.make(
            "compress-answers",
            "Ask the teacher",
            "pipelines.compress.teacher:answers",
            {
                "source": teacher.to_dict(),
                "task": self.task.name,
                "data": self._data(),
                "seed": self.recipe.seed,
                "max_length": max_length,
            },
            inputs=inputs | {"seed": self.recipe.seed},
            packages=PACKAGES,
        )
        return str(made.folder), made.id

    def _columns(self) -> dict[str, Any]:
        return dict(self.asked.columns or self.recipe.data.columns)

    def _data(self) -> dict[str, Any]:
        paths = {"train": self.asked.data, "validation": self.asked.validation, "unlabelled": self.asked.unlabelled}
        limits = {"train": self.asked.limit}
        columns = self._columns()
        texts = {role: column for role, column in columns.items() if role in self.task.roles}
        return {
            name: None
            if path is None
            else {
                "path": path,
                "columns": texts if name == "unlabelled" else columns,
                "split": self.asked.split if name == "train" else None,
                "limit": limits.get(name),
            }
            for name, path in paths.items()
        }

    def _data_id(self) -> dict[str, Any]:
        kept = {
            name: None if one is None else {k: v for k, v in one.items() if k != "path"}
            for name, one in self._data().items()
        }
        formats = {name: data_format(one["path"]) for name, one in self._data().items() if one is not None}
        return {"sets": kept, "sha256": dict(self.digests), "formats": formats}

    def _note(self, checkpoints: Path, kind: str, source: Source, settings: Mapping[str, Any]) -> None:
        from pipelines.compress.interrupted import has_checkpoint, note_settings

        if has_checkpoint(checkpoints):
            self.shop.progress.say(f"{_TITLES[kind]}: going on from the last checkpoint of an interrupted training")
        told = note_settings(checkpoints, {"step": kind, "source": source.digest, "settings": dict(settings)})
        if told:
            self.shop.progress.say(f"{_TITLES[kind]}: {told}")


def describe(record: Mapping[str, Any]) -> str:
    """What a step did, in a few words."""
    kind, asked = record["kind"], record["asked"]
    if kind == "finetune":
        return "fine-tuned"
    if kind == "distil":
        layers = record["size"].get("layers")
        return f"distilled into {layers} layers" if layers else "distilled"
    if kind == "share":
        parts = []
        if asked["layers"] is not None:
            parts.append(f"layers in {len(record['shared']['layers'])} groups")
        parts += ["tied embeddings"] if asked["embeddings"] else []
        parts += [f"{asked['clusters']} values a matrix"] if asked["clusters"] else []
        return "shared: " + ", ".join(parts)
    removed = record["removed"]
    if asked["vocabulary"]:
        return f"{removed['tokens_after']} of {removed['tokens_before']} tokens kept"
    if asked["pattern"]:
        return f"pruned {asked['pattern']}"
    if asked["sparsity"] is not None:
        return f"{removed['sparsity']:.0%} of the weights zero"
    parts = []
    for what in ("heads", "neurons"):
        before, after = sum(removed["before"][what]), sum(removed["after"][what])
        if asked[what]:
            parts.append(f"{before - after} of {before} {what}")
    if asked["layers"]:
        parts.insert(0, f"{asked['layers']} layers")
    return "removed " + ", ".join(parts)


def learned(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A step's settings that change what is learned; models are identified by their content elsewhere."""
    without = {key: value for key, value in settings.items() if key not in ("student", "save_minutes")}
    if not isinstance(without.get("teacher"), bool):  # `recover.teacher` says whether, not who
        without.pop("teacher", None)
    if isinstance(without.get("recover"), Mapping):
        without["recover"] = learned(without["recover"])
    return without


def _need_accelerate() -> None:
    import importlib.util

    if importlib.util.find_spec("accelerate") is None:
        remedy = "pip install 'planish[compress]'"
        raise EnvironmentLackError("training needs a package that is missing", "accelerate", remedy)


__all__ = ["MODEL", "Compressed", "Hop", "compress", "describe"]
