"""The runtimes that Planish delivers to. Importing this package registers them; none is loaded before it is used."""

from exporter.targets import inductor, inductor_cuda, onnxruntime, onnxruntime_cuda, openvino, tensorrt
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
    "inductor_cuda",
    "onnxruntime",
    "onnxruntime_cuda",
    "openvino",
    "register_target",
    "targets",
    "tensorrt",
]
