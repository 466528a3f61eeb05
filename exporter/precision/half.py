"""Converts an FP32 ONNX model to FP16 or BF16: strongly typed, with casts only where two types meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from exporter.artifact import InputContract
from exporter.errors import RequestError
from exporter.precision.constants import describe
from exporter.precision.facts import ConstantChange, Facts, Measured, constant, is_cast
from exporter.precision.ranges import MARGIN, Range
from exporter.precision.rules import apply_rules
from exporter.precision.schemas import half_type, is_float

if TYPE_CHECKING:
    import onnx_ir as ir

BF16_OPSET = 22
"""The opset that gave bfloat16 to Conv, the poolings and most elementwise operators that lacked it."""

_MIN_IR_VERSION = {22: 10}


def convert(
    path_in: Path | str,
    path_out: Path | str,
    *,
    precision: Literal["fp16", "bf16"],
    contract: InputContract,
    ranges: Mapping[str, Range] | None = None,
    keep: Sequence[str] = (),
    io_types: Literal["fp32", "half"] = "fp32",
    margin: float = MARGIN,
    rules: Sequence[str] | None = None,
    external_data: bool | None = None,
) -> dict[str, Any]:
    """Convert an FP32 ONNX model to half precision.

    Every operator gets float inputs of one type (what TensorRT's strong typing demands); rules decide which stay
    FP32. Integer and boolean arithmetic is untouched. The same input gives the same bytes.

    Args:
        path_in: The FP32 model.
        path_out: Where the half model goes (weights beyond protobuf's limit into a file beside it).
        precision: ``"fp16"`` or ``"bf16"``.
        contract: What callers promise about the inputs: a mask may be clamped, an integer trusted to be small.
        ranges: What was measured of the FP32 model's values over data, by name. Where a value was measured its figures
            decide what stays FP32, elsewhere the operator does.
        keep: Names of nodes that stay FP32.
        io_types: ``"fp32"`` leaves float inputs and outputs as they are, ``"half"`` makes them half.
        margin: Measured ranges are multiplied by it before they are compared with the half type's.
        rules: Names of the rules to apply beside those that validity needs; ``None`` for all
            (`exporter.precision.rules.rules`).
        external_data: As `exporter.onnx_files.save_model` has it.

    Returns:
        The record for ``evidence/precision.json``: ``kept`` has every node left in FP32, with the rule, the reason
        and its figures; ``cleared`` has every node that would stay FP32 without data and is half by what they show;
        ``constants.changed`` has every constant whose values were clamped.

    Raises:
        RequestError: The model can't be read, or `keep`, `rules`, `precision` or `io_types` names what doesn't exist.
        InternalError: The result is not strongly typed, or ONNX's checker refuses it.
    """
    from exporter.onnx_files import load_model, save_model, weight_bytes
    from exporter.precision.check import check_model, check_strongly_typed
    from exporter.precision.retype import retype

    half = half_type(precision)
    if io_types not in ("fp32", "half"):
        raise RequestError("unknown io_types", io_types, "Choose fp32 or half")
    if not margin >= 1:
        raise RequestError("the margin of measured ranges is below 1", margin, f"Give 1 or more, {MARGIN:g} by default")
    model = load_model(path_in)
    opset_before, bytes_before = model.graph.opset_imports.get("", 1), weight_bytes(model)
    prepared = prepare(model)
    stats: Measured = {}

    def decided(opset: int | None = None) -> Facts:
        facts = Facts(
            model,
            half,
            contract,
            ranges=ranges,
            margin=margin,
            keep=keep,
            io_half=io_types == "half",
            opset=opset,
            stats=stats,
        )
        apply_rules(facts, rules)
        return facts

    facts = decided()
    gained: list[str] = []
    if half.name == "bf16" and opset_before < BF16_OPSET and _blocked(facts):
        gained = _gained(facts, decided(BF16_OPSET))
        if gained and raise_opset(model, BF16_OPSET):
            name_nodes(model)
            facts = decided()
        else:
            gained = []
    changed = _changed_constants(facts)
    untouched = sum(1 for n in facts.nodes if not facts.is_kept(n) and not facts.decidable(n))
    retyped = retype(facts)
    check_strongly_typed(model)
    check_model(model)
    save_model(model, path_out, external_data=external_data)
    return {
        "precision": precision,
        "io_types": io_types,
        "margin": margin,
        "rules": "all" if rules is None else list(rules),
        "opset": {
            "before": opset_before,
            "after": model.graph.opset_imports.get("", 1),
            "why": f"{half.name} for {', '.join(gained)}" if gained else "",
        },
        "converted": len(retyped.converted),
        "untouched": untouched,
        "kept": [facts.kept[str(n.name)].to_dict() for n in facts.nodes if n.name in facts.kept],
        "cleared": [facts.cleared[str(n.name)].to_dict() for n in facts.nodes if _is_cleared(facts, n)],
        "asked_without_effect": [name for name in facts.asked if name not in facts.kept],
        "softmax_fp32_inside": retyped.softmax_inside,
        "casts": {"inserted": len(retyped.casts), "removed": retyped.casts_removed},
        "constants": {
            "half": retyped.constants_half,
            "fp32": retyped.constants_fp32,
            "stored_twice": retyped.constants_twice,
            "half_with_cast": retyped.constants_cast,
            "changed": changed,
        },
        "prepared": prepared,
        "weight_bytes": {"before": bytes_before, "after": weight_bytes(model)},
    }


def prepare(model: ir.Model) -> dict[str, int]:
    """Bring a model, in place, into the form that conversion works on.

    Model-local functions are inlined, `Constant` nodes become initializers, `CastLike` becomes `Cast`, casts to the
    same type go, node names become unique, and every value gets its type where that can be inferred.

    Returns:
        How much of each was done.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass

    from exporter.precision.check import infer_types

    inlined = len(model.functions)
    if inlined:
        InlinePass()(model)
    lifted = sum(1 for n in model.graph.all_nodes() if n.op_type == "Constant")
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    lifted -= sum(1 for n in model.graph.all_nodes() if n.op_type == "Constant")
    name_nodes(model)
    infer_types(model)
    likes = idle = 0
    for node in list(model.graph.all_nodes()):
        output = node.outputs[0] if node.outputs else None
        if node.op_type == "CastLike" and node.domain == "" and output is not None and output.dtype is not None:
            cast = ir.node("Cast", [node.inputs[0]], {"to": int(output.dtype)}, name=node.name)
            _replace(node, cast)
            likes += 1
            node = cast
        if is_cast(node) and _casts_to_same_type(node):
            value, source = node.outputs[0], node.inputs[0]
            if not value.is_graph_output() and source is not None and node.graph is not None:
                value.replace_all_uses_with(source)
                node.graph.remove(node, safe=True)
                idle += 1
    return {"functions_inlined": inlined, "constants_lifted": lifted, "cast_likes": likes, "idle_casts_removed": idle}


def name_nodes(model: ir.Model) -> None:
    """Give every node a name of its own, in place; names that are unique already stay."""
    seen: set[str] = {str(n.name) for n in model.graph.all_nodes() if n.name}
    used: set[str] = set()
    for node in model.graph.all_nodes():
        if node.name and node.name not in used:
            used.add(node.name)
            continue
        base, number = node.name or node.op_type, 0
        while (name := f"{base}_{number}") in seen:
            number += 1
        node.name = name
        seen.add(name)
        used.add(name)


def _replace(node: ir.Node, by: ir.Node) -> None:
    old, new = node.outputs[0], by.outputs[0]
    new.name, new.type, new.shape = old.name, old.type, old.shape
    assert node.graph is not None
    graph = node.graph
    graph.insert_after(node, by)
    old.replace_all_uses_with(new)
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new
    graph.remove(node, safe=True)


def _casts_to_same_type(node: ir.Node) -> bool:
    source = node.inputs[0]
    return source is not None and source.dtype is not None and int(source.dtype) == node.attributes["to"].as_int()


def _blocked(facts: Facts) -> bool:
    return any(decision.rule == "no_half_type" for decision in facts.kept.values())


def _gained(now: Facts, raised: Facts) -> list[str]:
    """Operators that would compute in half if the model's opset were raised, and can't now."""
    gained = {
        node.op_type
        for node in now.nodes
        if now.is_kept(node) and now.kept[str(node.name)].rule == "no_half_type" and raised.becomes_half(node)
    }
    return sorted(gained)


def raise_opset(model: ir.Model, opset: int) -> bool:
    """Move the model to a newer opset, in place; false where ONNX's converters can't."""
    import logging

    from onnxscript.version_converter import ConvertVersionPass

    logger = logging.getLogger("onnxscript.version_converter")
    disabled, logger.disabled = logger.disabled, True
    try:
        ConvertVersionPass(opset, fallback=True)(model)
    finally:
        logger.disabled = disabled
    if model.graph.opset_imports.get("", 1) != opset:
        return False
    model.ir_version = max(model.ir_version, _MIN_IR_VERSION.get(opset, model.ir_version))
    return True


def _is_cleared(facts: Facts, node: ir.Node) -> bool:
    return node.name in facts.cleared and not facts.is_kept(node)


def _changed_constants(facts: Facts) -> list[dict[str, Any]]:
    """Constants that a rule clamps, and those that clamp because the rule that keeps their readers was left out."""
    changed = dict(facts.changes)
    for graph in facts.model.graphs():
        for value in graph.initializers.values():
            if not is_float(value) or not constant(value) or not facts.stats(value).beyond:
                continue
            if any(facts.becomes_half(use.node) for use in value.uses()):
                name = str(value.name)
                why = "clamped to the half type's range, since the rule constant_range was left out"
                figures = {"limit": facts.half.largest, **describe(facts.stats(value))}
                changed.setdefault(name, ConstantChange(name, "none", why, figures))
    return [change.to_dict() for change in changed.values()]
