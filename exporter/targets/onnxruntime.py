"""ONNX Runtime on the CPU: portable ONNX as it is, and the same graph fused for ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from exporter.artifact import Artifact, Variant
from exporter.errors import InternalError, RequestError, first_line, missing_package
from exporter.targets.base import (
    PLAINLY,
    Array,
    Availability,
    Binding,
    BuildHow,
    Session,
    Target,
    output_shapes,
    register_target,
)
from exporter.targets.packages import installed_version

if TYPE_CHECKING:
    import onnx
    import onnxruntime

CPU_PROVIDER = "CPUExecutionProvider"
PACKAGES = ("onnxruntime", "onnxruntime-gpu")
INTEGER_KERNELS = frozenset(
    {
        *("MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearMatMul", "QGemm"),
        *("QAttention", "QLinearConv", "ConvInteger"),
    }
)
"""Operators whose arithmetic is on integers."""
INTEGER_WEIGHTS = "MatMulNBits"
"""The operator whose weights are integers of the bits that it says; how it computes is up to its accuracy level."""
WEIGHT_BITS = {"int8": 8, "int4": 4}
"""Bits per weight of the precisions whose integers the runtime is asked about."""
LITERAL = "literal"
"""The form of a variant that is opened to look at the numbers of a Q/DQ graph: its pairs are computed as they stand,
between FP32 operators. No recipe offers it."""


class OnnxRuntimeBinding(Binding):
    """Inputs and outputs of one ONNX Runtime session, bound through its I/O binding."""

    def __init__(self, session: onnxruntime.InferenceSession, artifact: Artifact, arrays: dict[str, Array]) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._arrays = arrays  # bound by address: they must outlive the binding
        self._outputs: dict[str, Array] = {}
        self._names = [spec.name for spec in artifact.signature.outputs]
        for name, array in arrays.items():
            self._binding.bind_cpu_input(name, array)
        shapes = output_shapes(artifact.signature, arrays)
        for spec in artifact.signature.outputs:
            shape = shapes[spec.name]
            if shape is None:
                self._binding.bind_output(spec.name, "cpu")
                continue
            buffer = np.empty(shape, dtype=spec.dtype)
            self._outputs[spec.name] = buffer
            self._binding.bind_output(spec.name, "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def outputs(self) -> dict[str, Any]:
        if len(self._outputs) == len(self._names):
            return dict(self._outputs)
        return dict(zip(self._names, self._binding.copy_outputs_to_cpu(), strict=True))


class OnnxRuntimeSession(Session):
    """An ONNX file opened by ONNX Runtime on the CPU."""

    def __init__(
        self, artifact: Artifact, precision: str, threads: int, *, optimize: bool = True, literal: bool = False
    ) -> None:
        super().__init__(artifact)
        self._precision, self._literal = precision, literal
        self._session = open_cpu_session(artifact.path, threads, optimize=optimize, literal=literal)
        graph_inputs = {value.name for value in self._session.get_inputs()}
        if graph_inputs != {spec.name for spec in artifact.signature.inputs}:
            raise RequestError(
                "the ONNX file's inputs are not those of the signature",
                ", ".join(sorted(graph_inputs)),
                "Export the model again",
            )

    def _bind(self, arrays: dict[str, Array]) -> OnnxRuntimeBinding:
        return OnnxRuntimeBinding(self._session, self.artifact, arrays)

    def executed(self) -> dict[str, Any]:
        import onnxruntime as ort

        ran = {
            "runtime": f"onnxruntime {ort.__version__}",
            "device": "cpu",
            "provider": self._session.get_providers()[0],
            "precision": self._precision,
        }
        if self._literal:
            return {**ran, "precision": "fp32", "emulates": self._precision}
        if self._precision not in WEIGHT_BITS:
            return ran
        nodes = nodes_that_run(self.artifact.path)
        kernels = Counter(node.op_type for node in nodes)
        integer = {name: count for name, count in sorted(kernels.items()) if name in INTEGER_KERNELS}
        weights = _weight_bits(nodes)
        found = {"int8": bool(integer or weights[WEIGHT_BITS["int8"]]), "int4": bool(weights[WEIGHT_BITS["int4"]])}
        return {
            **ran,
            "precision": self._precision if found[self._precision] else "fp32",
            "integer_kernels": integer,
            "integer_weights": {f"{INTEGER_WEIGHTS}, {bits} bits": count for bits, count in sorted(weights.items())},
        }


def open_cpu_session(
    path: Path, threads: int, *, optimize: bool = True, early: bool = False, literal: bool = False
) -> onnxruntime.InferenceSession:
    """Open an ONNX file on ONNX Runtime's CPU provider, and make sure that it is the CPU provider that runs it.

    Args:
        path: The ONNX file; external data lies beside it.
        threads: Threads within an operator.
        optimize: Let ONNX Runtime optimize the graph; off where the graph must run exactly as written.
        early: Run every operator as soon as its inputs are there. By default ONNX Runtime leaves operators that nothing
            waits for to the end, and keeps what they read until then: reductions of all activations then hold all of
            these at once (MiniLM at 8 x 128: 1.0 GB instead of 0.4).
        literal: Compute Q/DQ pairs as they stand: what is around them is not fused into kernels on integers, whose
            rounding is not that of the pairs.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise missing_package("onnxruntime", "cpu") from None
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if early:
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    if literal:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(str(path), options, providers=[CPU_PROVIDER])
    except Exception as error:  # ONNX Runtime has no common base class for its errors
        raise RequestError("ONNX Runtime cannot open the model", path, first_line(error)) from error
    if session.get_providers()[0] != CPU_PROVIDER:
        raise InternalError("ONNX Runtime chose another provider than was asked for", session.get_providers())
    return session


def kernels_that_run(path: Path) -> Counter[str]:
    """How many of which operators are left when ONNX Runtime has optimized a model: what really runs."""
    return Counter(node.op_type for node in nodes_that_run(path))


def nodes_that_run(path: Path) -> list[onnx.NodeProto]:
    """The nodes that are left when ONNX Runtime has optimized a model."""
    import onnx
    import onnxruntime as ort

    with tempfile.TemporaryDirectory(prefix=".planish-kernels-") as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(str(path), options, providers=[CPU_PROVIDER])
        return list(onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node)


def _weight_bits(nodes: Sequence[onnx.NodeProto]) -> Counter[int]:
    """How many products have weights of how many bits."""
    found = [node for node in nodes if node.op_type == INTEGER_WEIGHTS]
    return Counter(entry.i for node in found for entry in node.attribute if entry.name == "bits")


@register_target
class OnnxRuntimeCpu(Target):
    """ONNX Runtime's CPU provider."""

    name = "onnxruntime-cpu"
    consumes = "onnx"
    precisions = ("fp32", "int8", "int4")
    forms: ClassVar = {"fp32": (None, "fused"), "int8": ("dynamic",)}
    rare_forms: ClassVar = {"int8": ("dynamic-fused", "dynamic-smooth", "weights")}

    def availability(self, variant: Variant | None = None) -> Availability:
        found = installed_version(*PACKAGES)
        if found is None:
            return Availability(False, "onnxruntime is not installed", "pip install 'planish[cpu]'")
        return Availability(True, versions={"onnxruntime": found})

    def buildable(self, variant: Variant) -> Availability:
        from exporter.passes.fuse_onnxruntime import can_fuse

        if "fused" in (variant.form or "").split("-") and not can_fuse():
            told = f"transformers {installed_version('transformers')} has no fusions for ONNX Runtime"
            return Availability(False, told, "pip install --upgrade transformers")
        return self.availability(variant)

    def build(self, artifact: Artifact, variant: Variant, folder: Path, how: BuildHow = PLAINLY) -> list[Path]:
        return []

    def open(
        self, artifact: Artifact, variant: Variant, *, threads: int, trusted_digests: frozenset[str] = frozenset()
    ) -> Session:
        return OnnxRuntimeSession(artifact, variant.precision, threads, literal=variant.form == LITERAL)
