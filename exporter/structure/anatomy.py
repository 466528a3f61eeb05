"""Where the parts of an encoder's layers are, by model type: the data that pruning and sharing need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporter.errors import RequestError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Anatomy:
    """Paths of a layer's parts, relative to the layer, and the names of their sizes in the configuration.

    Attributes:
        types: Values of ``model_type`` that are built so.
        layers: Path of the list of layers below the base model.
        query: The projection to queries: a linear layer of (heads x head size) rows. So are `key` and `value`.
        key: See `query`.
        value: See `query`.
        output: The projection of the heads' results back: (heads x head size) columns.
        up: The feed-forward block's first linear layer: a row per neuron.
        down: Its second: a column per neuron.
        heads_at: Module that counts its heads in attributes.
        head_count: Its attribute with the number of heads; empty where it has none.
        head_width: Its attribute with heads x head size; empty where it has none.
        config_layers: The configuration's number of layers.
        config_heads: Its number of heads.
        config_neurons: Its number of neurons.
        why_no_heads: Why heads cannot be removed; empty where they can.
    """

    types: tuple[str, ...]
    layers: str
    query: str
    key: str
    value: str
    output: str
    up: str
    down: str
    heads_at: str
    head_count: str = "num_attention_heads"
    head_width: str = "all_head_size"
    config_layers: str = "num_hidden_layers"
    config_heads: str = "num_attention_heads"
    config_neurons: str = "intermediate_size"
    why_no_heads: str = ""


_BERT = Anatomy(
    types=("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie"),
    layers="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",
    heads_at="attention.self",
)
_DISTILBERT = Anatomy(
    types=("distilbert",),
    layers="transformer.layer",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    output="attention.out_lin",
    up="ffn.lin1",
    down="ffn.lin2",
    heads_at="attention",
    head_count="n_heads",
    head_width="",
    config_layers="n_layers",
    config_heads="n_heads",
    config_neurons="hidden_dim",
)
_MPNET = Anatomy(
    types=("mpnet",),
    layers="encoder.layer",
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    output="attention.attn.o",
    up="intermediate.dense",
    down="output.dense",
    heads_at="attention.attn",
    why_no_heads="all layers share one relative position bias with a column per head",
)
_VIT = Anatomy(
    types=("vit", "deit"),
    layers="layers",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.o_proj",
    up="mlp.fc1",
    down="mlp.fc2",
    heads_at="attention",
    head_width="",
)
_ANATOMIES = (_BERT, _DISTILBERT, _MPNET, _VIT)


@dataclass(frozen=True)
class LayerParts:
    """The linear layers of one encoder layer, and what counts its heads."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    up: nn.Linear
    down: nn.Linear
    attention: nn.Module
    head_size: int

    @property
    def heads(self) -> int:
        return self.query.out_features // self.head_size

    @property
    def neurons(self) -> int:
        return self.up.out_features


def supported_types() -> tuple[str, ...]:
    """The model types whose inside is known."""
    return tuple(name for anatomy in _ANATOMIES for name in anatomy.types)


def anatomy_of(model: Any) -> Anatomy:
    """How a `transformers` model is built.

    Raises:
        RequestError: Its type is not known, or it is not built as its type should be; names the module.
    """
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    found = next((anatomy for anatomy in _ANATOMIES if model_type in anatomy.types), None)
    remedy = f"Models of these types can be changed inside: {', '.join(supported_types())}"
    if found is None:
        raise RequestError(
            "the inside of this model is not known", f"{type(model).__name__} of type {model_type!r}", remedy
        )
    layers = layers_at(model, found.layers)
    if layers is None:
        where = f"{type(model).__name__} has no {found.layers}"
        raise RequestError("the inside of this model is not as its type has it", where, remedy)
    for number, layer in enumerate(layers):
        for path in (found.query, found.key, found.value, found.output, found.up, found.down):
            if not _is_linear(_below(layer, path)):
                where = f"{found.layers}.{number}.{path} of {type(model).__name__}"
                raise RequestError("a part of this model is no linear layer, or is not there", where, remedy)
    return found


def layers_of(model: Any) -> nn.ModuleList:
    """The list of a model's encoder layers.

    Raises:
        RequestError: As `anatomy_of`.
    """
    found = layers_at(model, anatomy_of(model).layers)
    if found is None:  # `anatomy_of` looked
        raise RequestError("the model has no layers", type(model).__name__)
    return found


def input_embedding(model: Any) -> Any:
    """A model's table of input embeddings; ``None`` where a class of somebody's own does not tell."""
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def layers_at(model: Any, path: str) -> Any:
    """What stands at `path` below the base model, or ``None``."""
    return _below(getattr(model, model.base_model_prefix, model) if model.base_model_prefix else model, path)


def layer_parts(model: Any, number: int) -> LayerParts:
    """The parts of one layer.

    Raises:
        RequestError: As `anatomy_of`, or there is no such layer.
    """
    anatomy, layers = anatomy_of(model), layers_of(model)
    if not 0 <= number < len(layers):
        raise RequestError("the model has no such layer", number, f"It has layers 0 to {len(layers) - 1}")
    layer = layers[number]
    attention = _below(layer, anatomy.heads_at)
    return LayerParts(
        query=_below(layer, anatomy.query),
        key=_below(layer, anatomy.key),
        value=_below(layer, anatomy.value),
        output=_below(layer, anatomy.output),
        up=_below(layer, anatomy.up),
        down=_below(layer, anatomy.down),
        attention=attention,
        head_size=head_size(model),
    )


def head_size(model: Any) -> int:
    """Rows of a projection that belong to one head: what the configuration says, which pruning leaves as it is."""
    config, anatomy = model.config, anatomy_of(model)
    stated = getattr(config, "head_dim", None)
    hidden = int(getattr(config, "hidden_size", 0) or config.dim)
    return int(stated) if isinstance(stated, int) else hidden // int(getattr(config, anatomy.config_heads))


def linear_weights(model: Any) -> Iterable[tuple[str, nn.Parameter]]:
    """The weight matrices of the encoder's layers, each once, by their full names: what weight pruning works on.

    Raises:
        RequestError: As `anatomy_of`.
    """
    anatomy = anatomy_of(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: set[int] = set()
    for layer in layers_of(model):
        for path in (anatomy.query, anatomy.key, anatomy.value, anatomy.output, anatomy.up, anatomy.down):
            weight = _below(layer, path).weight
            if id(weight) not in seen:
                seen.add(id(weight))
                yield names[id(weight)], weight


def _below(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _is_linear(module: Any) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear)
