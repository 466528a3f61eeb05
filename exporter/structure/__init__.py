"""How encoders are built inside, and changing it: fewer heads, neurons and layers, layers that share their weights."""

from exporter.structure.anatomy import (
    Anatomy,
    LayerParts,
    anatomy_of,
    input_embedding,
    layer_parts,
    layers_of,
    supported_types,
)
from exporter.structure.checkpoint import load_state, read_state, save_checkpoint
from exporter.structure.surgery import (
    STRUCTURE,
    apply_structure,
    keep_layers,
    remove_heads,
    remove_neurons,
    share_layers,
    shares_of,
    structure_of,
)

__all__ = [
    "STRUCTURE",
    "Anatomy",
    "LayerParts",
    "anatomy_of",
    "apply_structure",
    "input_embedding",
    "keep_layers",
    "layer_parts",
    "layers_of",
    "load_state",
    "read_state",
    "remove_heads",
    "remove_neurons",
    "save_checkpoint",
    "share_layers",
    "shares_of",
    "structure_of",
    "supported_types",
]
