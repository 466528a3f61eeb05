"""What TensorRT's builder says against a graph or a GPU, in words: which node, where in the model, and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import EnvironmentLackError, InternalError, NoSpaceError, PlanishError, RequestError
from exporter.targets import tensorrt_child

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

RTX, TENSORRT = "tensorrt_rtx", "tensorrt"
CHECK = "Check the file with onnx.checker; another version of TensorRT may take it"
INT8 = "use the int8 form made for TensorRT (model_int8_tensorrt.onnx)"
CAST = "TensorRT takes types as they stand: let Planish lower the graph, or add a Cast there"
ROUNDING = f"It rounds to signed numbers, symmetrically, only: {INT8}"
HINTS = {
    ("same input types", "of the same type", "of same types", "identical types"): CAST,
    ("shiftIsAllZeros", "unsupported input type of UINT8"): ROUNDING,
    ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinear"): f"It has no such operator: {INT8}",
    ("Plugin not found", "MatMulNBits"): (
        "ONNX Runtime's own operators are for ONNX Runtime: use the portable graph (model.onnx), or a form made for "
        "TensorRT"
    ),
    ("Attention operation was not supported",): (
        "It has a kernel for the whole operator or none at all: write the file with operators older than 23, as "
        "export.opset=20 does, in which attention is matrix products that it fuses itself"
    ),
    ("libnvinfer_lean",): (
        "A version-compatible engine carries TensorRT's lean runtime, which is not installed: install it, or leave "
        "engine.version_compatible out"
    ),
    ("status == CUDA_SUCCESS",): "With engine.refit this library needs a GPU to build: leave it out, or build on one",
    ("but must match",): "The shapes do not fit: check the file with onnx.checker and shape inference",
}
"""What in the builder's words leads to which advice."""
PLAIN = {"false": "TensorRT has no such operator", "creator &&": "TensorRT has no such operator (Plugin not found)"}
"""How descriptions begin that are code, and what they mean."""
TYPES = {
    "fp8_e4m3": ("FP8", "8.9 (Ada)"),
    "b16": ("BF16", "8.0 (Ampere)"),
}
"""By the library's name of a type: ours, and the GPUs that have it."""
LACKS_TYPE = re.compile(r"Cannot compile for target\(s\) (?P<gpus>.+?), because .* datatypes: (?P<types>[\w, ]+)")
TURING = re.compile(r"Cannot compile operation '(?P<node>.*?)' for Turing \(SM75\): (?P<text>[^(]*?)(?:\.|$)")


class OptionError(RequestError):
    """An option that the installed version lacks (exit status 2)."""


def crashed(onnx: Path, returncode: int, errors: str) -> PlanishError:
    """The error of a builder that ended without an answer.

    Args:
        onnx: The file that it built.
        returncode: How its process ended.
        errors: What it printed to stderr.
    """
    lines = [line for line in errors.splitlines() if line.strip()]
    if returncode == tensorrt_child.DISK_FULL:
        return NoSpaceError("no space is left to write the engine", onnx.name, "Free some disk space")
    how = f"signal {-returncode}" if returncode < 0 else f"exit status {returncode}"
    return InternalError(
        "TensorRT's builder ended without an answer",
        f"{onnx.name}: {how}{': ' + lines[-1].strip()[:300] if lines else ''}",
        "The other targets are not affected; a smaller shape envelope or another version may help",
    )


def explain(told: Mapping[str, Any], module: str, onnx: Path) -> PlanishError:
    """The error of a build that failed, from the child's answer."""
    first, others = told["errors"][0] if told["errors"] else {"description": "no reason was given"}, len(told["errors"])
    text = _sentence(str(first["description"]))
    if told["stage"] == "import":
        how = "pip install 'planish[rtx]'" if module == RTX else "docs/targets.md says how to install TensorRT"
        return EnvironmentLackError(f"{module} cannot be imported", text, how)
    if told["stage"] == "options":
        names = ", ".join(f"{error['option']} ({error['description']})" for error in told["errors"])
        what = f"{module} {told['version']} has no such option"
        return OptionError(what, names, "Ask for another, or use another version of the library")
    if lack := _lack_of_gpu(str(first["description"]), onnx):
        return lack
    model = _read(onnx)
    node = _find(model, first, text)
    where, what = onnx.name, "TensorRT cannot build the engine"
    if told["stage"] == "parse":
        what = (
            "TensorRT refuses a node of the graph"
            if node or first.get("operator")
            else "TensorRT cannot read the graph"
        )
    if node is not None:
        where = f"{node.op_type} {_title(node)} of {onnx.name}{_surroundings(model, node)}"
    elif first.get("node") or first.get("operator"):
        where = f"{first.get('operator') or 'node'} {first.get('node', '')!r} of {onnx.name}"
    more = f" (and {others - 1} more)" if told["stage"] == "parse" and others > 1 else ""
    said = f"{first.get('operator', '')} {first['description']}"
    advice = next((hint for marks, hint in HINTS.items() if any(mark in said for mark in marks)), CHECK)
    for name in filter(None, (first.get("node"), node and f"node_of_{node.output[0]}")):
        text = text.removeprefix(f"{name}: ")
    return RequestError(what, f"{where}{more}: {text}", advice)


def _lack_of_gpu(description: str, onnx: Path) -> PlanishError | None:
    """The error where the graph is well and the GPU lacks something."""
    if found := LACKS_TYPE.search(description):
        gpus = ", ".join(f"{name[:-1]}.{name[-1]}" for name in re.findall(r"sm(\d+)", found["gpus"]))
        known = [TYPES[name] for name in re.findall(r"\w+", found["types"]) if name in TYPES]
        if not known:
            what, advice = f"the GPU lacks a type of the graph ({found['types'].strip()})", "Take another precision"
        else:
            ours, since = known[0]
            instead = "fp16" if "7.5" in gpus or ours == "BF16" else "int8 or fp16"  # Turing multiplies in FP16 only
            what = f"GPUs of compute capability {gpus} have no {ours}"
            advice = f"{ours} takes compute capability {since} or later: for these GPUs take {instead} instead"
        return RequestError(what, onnx.name, advice)
    if found := TURING.search(description):
        return RequestError(
            "TensorRT for RTX multiplies in FP16 only on GPUs of compute capability 7.5 (Turing)",
            f"{found['node']!r} of {onnx.name}: {found['text'].strip()}",
            "For these GPUs take an fp16 file that keeps no product in FP32; other precisions take 8.0 or later",
        )
    return None


def _sentence(description: str) -> str:
    """The part of the library's message that says something: not what it says of a driver that is not there."""
    lines = [line.strip() for line in description.splitlines() if line.strip()]
    telling = [line for line in lines if "checkMacros" not in line and not line.startswith("Invalid Node")]
    text = (telling or lines or ["no reason was given"])[0]
    for start, meaning in PLAIN.items():
        if text == start or (start != "false" and text.startswith(start)):
            return meaning
    if found := re.search(r"Error Code \d+: [^(]*\((?P<core>.*?)(?:\. +In \w+ at [^)]*)?\)$", text):
        text = found["core"]
    if found := re.search(r"failed\. (?P<core>Attention operation was not supported[^.(]*)", text):
        text = found["core"]
    return re.sub(r"^Assertion failed: (?=\S+: )", "", text).rstrip(". ")[:300]


def _read(onnx: Path) -> ModelProto | None:
    """The graph without weights that lie beside it; ``None`` where it cannot be read."""
    from google.protobuf.message import DecodeError
    from onnx import load

    try:
        return load(onnx, load_external_data=False)
    except (DecodeError, OSError, ValueError):
        return None


def _find(model: ModelProto | None, error: Mapping[str, Any], text: str) -> NodeProto | None:
    """The node that an error is about: by its name, else by what its name would be, else by its operator."""
    nodes = [] if model is None else list(model.graph.node)
    if name := error.get("node"):
        return next((node for node in nodes if node.name == name), None)
    for node in nodes:
        if not node.name and node.output and re.search(rf"\bnode_of_{re.escape(node.output[0])}\b", text):
            return node
    if "Attention operation" in text:  # the builder does not say which; each is as good
        return next((node for node in nodes if node.op_type == "Attention"), None)
    return None


def _title(node: NodeProto) -> str:
    return repr(node.name) if node.name else f"without a name, which makes {node.output[0]!r},"


def _surroundings(model: ModelProto | None, node: NodeProto) -> str:
    """Where a node stands in the original model, when its own name does not say: between which others.

    Nodes are named after the module that they came from (``encoder.layer.0/Add``); what the exporter or a pass added
    may be called ``node_Split_3``.
    """
    if model is None or "/" in node.name:
        return ""
    makers = {output: other for other in model.graph.node for output in other.output}
    readers: dict[str, list[NodeProto]] = {}
    for other in model.graph.node:
        for name in other.input:
            readers.setdefault(name, []).append(other)
    before = _nearest(node, lambda one: [makers[name] for name in one.input if name in makers])
    after = _nearest(node, lambda one: [reader for name in one.output for reader in readers.get(name, ())])
    parts = [f"{word} {found!r}" for word, found in (("after", before), ("before", after)) if found]
    return f" ({', '.join(parts)})" if parts else ""


def _nearest(start: NodeProto, step: Callable[[NodeProto], Iterable[NodeProto]]) -> str | None:
    """The nearest node, going by `step`, whose name says which module it came from."""
    level, seen = [start], {id(start)}
    while level:
        level = [other for node in level for other in step(node) if id(other) not in seen]
        for other in level:
            if "/" in other.name:
                return str(other.name)
            seen.add(id(other))
    return None
