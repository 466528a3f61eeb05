"""The step ``share``: layers, embeddings or the elements of a matrix use the same weights."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from exporter.errors import RequestError
from exporter.structure import layers_of, share_layers
from exporter.structure.anatomy import linear_weights
from pipelines.compress.sections import ShareStep
from pipelines.compress.steps.desk import learn, open_desk


def share(arguments: dict[str, Any]) -> dict[str, Any]:
    """Let parts of the model share weights, and train afterwards where the recipe says so.

    Args:
        arguments: See `pipelines.compress.steps.desk.Desk`; ``step``: the recipe's.

    Returns:
        ``shared`` (what), ``training`` (or null), ``size``.
    """
    from pipelines.compress.clusters import KeepShared, cluster_all

    desk, settings = open_desk(arguments), ShareStep(**arguments["step"])
    model = desk.model
    shared: dict[str, Any] = {}
    if settings.layers is not None:
        groups = groups_of(settings.layers, len(layers_of(model)))
        share_layers(model, groups)
        shared["layers"] = groups
    if settings.embeddings:
        shared["embeddings"] = tie_embeddings(model)
    codes: dict[str, Any] = {}
    if settings.clusters is not None:
        codes = cluster_all(list(linear_weights(model)), settings.clusters)
        shared["clusters"] = settings.clusters
    trained = None
    if settings.recover is not None:
        trained = learn(
            desk, model, settings.recover, settings.recover.loss, callbacks=[KeepShared(codes)] if codes else []
        )
    return {"shared": shared, "training": trained, "size": desk.save(model, clustered=list(codes))}


def groups_of(layers: int | tuple[tuple[int, ...], ...], count: int) -> list[list[int]]:
    """Groups of layers: as listed, or so many groups of neighbours.

    >>> groups_of(2, 6)
    [[0, 1, 2], [3, 4, 5]]

    Raises:
        RequestError: There are not so many layers.
    """
    if not isinstance(layers, int):
        return [list(group) for group in layers if group]
    if layers > count:
        raise RequestError("there are fewer layers than groups", f"{layers} groups", f"The model has {count} layers")
    edges = [round(i * count / layers) for i in range(layers + 1)]
    return [list(range(a, b)) for a, b in pairwise(edges)]


def tie_embeddings(model: Any) -> dict[str, Any]:
    """Let the output layer use the input embedding's weights.

    Raises:
        RequestError: The model has no output layer over its vocabulary, or one of another shape.
    """
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weight = getattr(output, "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise RequestError(
            "the model has no output layer over its vocabulary", type(model).__name__, "Leave out embeddings"
        )
    if weight.shape != embedding.weight.shape:
        told = f"{tuple(weight.shape)} and {tuple(embedding.weight.shape)}"
        raise RequestError("output layer and input embedding differ in shape", told, "Leave out embeddings")
    were = weight.data_ptr() == embedding.weight.data_ptr()
    output.weight = embedding.weight
    model.config.tie_word_embeddings = True
    return {"were_tied": were}
