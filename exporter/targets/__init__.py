"""The runtimes that Planish delivers to. Importing this package registers them; none is loaded before it is used."""

from exporter.targets import inductor, nvidia, onnxruntime, openvino
from exporter.targets.base import (
    Availability,
    Binding,
    Session,
    Target,
    check_inputs,
    get_target,
    register_target,
    targets,
)

__all__ = [
    "Availability",
    "Binding",
    "Session",
    "Target",
    "check_inputs",
    "get_target",
    "inductor",
    "nvidia",
    "onnxruntime",
    "openvino",
    "register_target",
    "targets",
]
