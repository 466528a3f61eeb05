"""The step ``prune``: weights, heads and neurons and layers, or tokens; and training that makes up for it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from exporter.errors import RequestError
from exporter.structure import keep_layers, layers_of, remove_heads, remove_neurons, shares_of, structure_of
from exporter.structure.anatomy import anatomy_of, linear_weights
from pipelines.compress.sections import Prune
from pipelines.compress.steps.desk import Desk, learn, open_desk
from pipelines.processes import report_progress

NEURONS_TOGETHER = 16
"""Neurons stay in multiples of so many where a layer has more: kernels work on whole vectors."""
_BATCH = 32


def prune(arguments: dict[str, Any]) -> dict[str, Any]:
    """Remove what matters least, and train afterwards where the recipe says so.

    Args:
        arguments: See `pipelines.compress.steps.desk.Desk`; ``step``: the recipe's.

    Returns:
        ``removed`` (what), ``training`` (or null), ``size``.
    """
    desk, settings = open_desk(arguments), Prune(**arguments["step"])
    return {"weights": _weights, "structure": _structure, "vocabulary": _vocabulary}[settings.kind](desk, settings)


def _weights(desk: Desk, settings: Prune) -> dict[str, Any]:
    from pipelines.compress.magnitude import KeepZeros, apply_masks, smallest_masked, two_of_four

    model = desk.model
    weights = list(linear_weights(model))
    masks = None
    if settings.pattern:
        masks = two_of_four(weights)
    elif settings.gradual == 1:
        masks = smallest_masked(weights, float(settings.sparsity or 0), settings.scope)
    if masks is not None:
        apply_masks(model, masks)
    keeping = KeepZeros(settings.sparsity, settings.scope, settings.gradual, masks)
    trained = None
    if settings.recover is not None:
        trained = learn(desk, model, settings.recover, settings.recover.loss, callbacks=[keeping])
    zeros = {name: 1 - float(torch.count_nonzero(w)) / w.numel() for name, w in linear_weights(model)}
    share = sum(zeros[name] * w.numel() for name, w in weights) / sum(w.numel() for _, w in weights)
    removed = {"sparsity": share, "pattern": settings.pattern, "by_matrix": zeros}
    return {"removed": removed, "training": trained, "size": desk.save(model)}


def _structure(desk: Desk, settings: Prune) -> dict[str, Any]:
    model = desk.model
    anatomy = anatomy_of(model)
    if settings.heads and anatomy.why_no_heads:
        told = f"{model.config.model_type}: {anatomy.why_no_heads}"
        raise RequestError("heads of this model cannot be removed", told, "Prune neurons or layers instead")
    if settings.layers >= len(layers_of(model)):
        told = f"{settings.layers} of {len(layers_of(model))}"
        raise RequestError("no layer would be left", told, "Remove fewer layers")
    found = importance(desk, settings.samples)
    before = _counts(model)
    if settings.layers:
        gone = found.layers.argsort()[: settings.layers].tolist()
        kept = [number for number in range(len(layers_of(model))) if number not in gone]
        keep_layers(model, kept)
        found = type(found)(
            [found.heads[i] for i in kept], [found.neurons[i] for i in kept], found.layers[kept], found.rows
        )
    unique = sorted(set(shares_of(model)))
    heads = lowest([found.heads[i] for i in unique], settings.heads, settings.uniform)
    neurons = lowest([found.neurons[i] for i in unique], settings.neurons, settings.uniform, NEURONS_TOGETHER)
    for number, some_heads, some_neurons in zip(unique, heads, neurons, strict=True):
        remove_heads(model, number, some_heads)
        remove_neurons(model, number, some_neurons)
    trained = None
    if settings.recover is not None:
        trained = learn(desk, model, settings.recover, settings.recover.loss)
    removed = {"before": before, "after": _counts(model), "rows": found.rows}
    return {"removed": removed, "training": trained, "size": desk.save(model)}


def importance(desk: Desk, rows: int) -> Any:
    """First-order importance of the model's parts on so many rows of the training data, drawn evenly.

    Measured on the loss of the labels, or of the model's own answers where there are none; of a sentence encoder on a
    random direction of its embeddings.
    """
    from pipelines.compress.examples import COUNTED, TARGET, collator
    from pipelines.compress.importance import measure_importance
    from pipelines.compress.objectives import IGNORED, hard_targets, logits_of, placed

    examples, collate, pool = desk.examples(None), collator(desk.pad, desk.pad_side), desk.pool()
    step = max(1, len(examples) // rows)
    chosen = sorted(range(0, len(examples), step)[:rows], key=lambda i: examples.lengths[i])
    generator = torch.Generator().manual_seed(desk.seed)

    def batches() -> Iterator[Any]:
        for start in range(0, len(chosen), _BATCH):
            report_progress(f"measuring importance: {start} of {len(chosen)} rows")
            yield collate([examples[i] for i in chosen[start : start + _BATCH]])

    def loss_of(model: Any, batch: Any) -> Any:
        outputs = model(**{name: batch[name] for name in examples.inputs})
        if pool is not None:
            embedding = pool(outputs.last_hidden_state, batch["attention_mask"])
            return (embedding * torch.randn(embedding.shape, generator=generator)).sum()
        mask = batch.get("attention_mask")
        logits, target = logits_of(outputs, mask), placed(batch[TARGET], outputs, mask)
        own, counted = logits.detach().argmax(dim=-1), batch[COUNTED]
        without = (target == IGNORED) & ((counted[:, None] if counted.ndim < target.ndim else counted) != IGNORED)
        return hard_targets(logits, torch.where(without, own, target))

    return measure_importance(desk.model.eval(), batches(), loss_of)


def lowest(scores: list[Any], share: float, uniform: bool, together: int = 1) -> list[list[int]]:
    """Which parts of each layer to remove: the least important ones, and in no layer all of them.

    Args:
        scores: By layer, the higher the more important.
        share: Of all parts, how many to remove.
        uniform: As many from each layer.
        together: What stays of a layer is a multiple of this, where the layer has at least twice as many.

    Returns:
        By layer, numbers of parts.
    """
    if share == 0:
        return [[] for _ in scores]
    if uniform:
        counts = [round(share * len(values)) for values in scores]
    else:
        everything = torch.cat([values.scatter(0, values.argmax(), torch.inf) for values in scores])
        number = torch.cat([torch.full((len(values),), i) for i, values in enumerate(scores)])
        most = len(everything) - len(scores)  # one of each layer stays
        gone = number[everything.argsort(stable=True)[: min(most, round(share * len(everything)))]]
        counts = [int((gone == i).sum()) for i in range(len(scores))]
    found = []
    for values, count in zip(scores, counts, strict=True):
        left = max(1, len(values) - count)
        if together > 1 and len(values) >= 2 * together:
            left = max(together, round(left / together) * together)
        found.append(sorted(values.argsort(stable=True)[: len(values) - left].tolist()))
    return found


def _counts(model: Any) -> dict[str, list[int]]:
    """Heads and neurons of each layer."""
    found = structure_of(model)
    return {kind: found[kind] for kind in ("heads", "neurons")}


def _vocabulary(desk: Desk, settings: Prune) -> dict[str, Any]:
    from pipelines.compress.vocabulary import cut_vocabulary

    source = desk.source
    root = source.files_folder
    if root is None:
        raise RequestError("the source has no tokenizer", source.spec)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        removed = cut_vocabulary(desk.model, root, out, texts_of(desk), min_count=settings.min_count)
        written = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
        options = {"replaced": written, "dropped": removed["files_dropped"]}
        trained = None
        if settings.recover is not None:
            from exporter.sources import resolve_source
            from pipelines.compress.models import save_model

            save_model(desk.model, source, out / "cut", **options)
            cut = Desk(resolve_source(str(out / "cut")), desk.task, desk.arguments)
            trained = learn(cut, desk.model, settings.recover, settings.recover.loss)
        return {"removed": removed, "training": trained, "size": desk.save(desk.model, **options)}


def texts_of(desk: Desk) -> Iterator[str]:
    """Every text that the training data hold."""
    for name in ("train", "unlabelled"):
        for row in desk.data(name) or ():
            for value in row.values():
                if isinstance(value, str):
                    yield value
                elif isinstance(value, list):
                    yield from (item for item in value if isinstance(item, str))
