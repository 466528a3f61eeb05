"""Int8 for AOTInductor: a `torch.export` program with quantized products, by torchao's PT2E, in the form that fuses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from calibration.quantize.products import Kept
from exporter.artifact import Artifact
from exporter.errors import NotApplicableError, RequestError, missing_package

if TYPE_CHECKING:
    import torch
    from torch import fx

Form = Literal["static", "static-smooth", "dynamic"]


@dataclass(frozen=True)
class Calibrated:
    """A program whose ranges are known, and of which quantized ones are made, whatever they keep.

    Attributes:
        artifact: The FP32 program.
        form: See `calibrate_program`.
        observed: The module, smoothed where the form is, with observers at everything that can be quantized.
        example: Inputs by name, for tracing.
        batches: Number of batches seen.
        smoothing: The record of smoothing; ``None`` where the form is a plain one.
    """

    artifact: Artifact
    form: Form
    observed: fx.GraphModule
    example: dict[str, torch.Tensor]
    batches: int
    smoothing: dict[str, Any] | None

    def layers(self) -> dict[str, tuple[int, ...]]:
        """The linear layers that can be quantized, in the order of the program, and the shapes of their weights."""
        modules = dict(self.observed.named_modules())
        found = {}
        for node in _linears(self.observed):
            if _is_observer(modules, node.args[1]):
                found[node.name] = tuple(node.args[1].args[0].meta["val"].shape)
        return found


def quantize_program(
    artifact: Artifact,
    path_out: Path,
    *,
    form: Form,
    samples: Callable[[], Iterable[Mapping[str, np.ndarray]]],
    alpha: float | None = None,
    keep: Collection[str] = (),
) -> dict[str, Any]:
    """Quantize the linear layers of a program: uint8 activations, int8 weights with a step per output channel.

    Args:
        artifact: A ``.pt2`` program in FP32; its signature says what may be dynamic.
        path_out: Where the quantized program goes.
        form: See `calibrate_program`.
        samples: See `calibrate_program`.
        alpha: See `calibrate_program`.
        keep: Names of the layers that stay in FP32, see `Calibrated.layers`.

    Returns:
        The record: ``quantized`` (how many products have integer inputs), the form, and what was ``kept``;
        ``smoothing`` where it was done.

    Raises:
        RequestError: No samples, nothing that could be quantized, an `alpha` out of range, or no such layer to `keep`.
        EnvironmentLackError: torchao is not installed.
    """
    return write_program(calibrate_program(artifact, form=form, samples=samples, alpha=alpha), path_out, keep)


def calibrate_program(
    artifact: Artifact,
    *,
    form: Form,
    samples: Callable[[], Iterable[Mapping[str, np.ndarray]]],
    alpha: float | None = None,
) -> Calibrated:
    """Put observers into a program, and let them see the calibration data.

    Args:
        artifact: A ``.pt2`` program in FP32.
        form: ``static`` takes ranges from `samples` (smallest and largest value seen), ``dynamic`` from each batch;
            ``static-smooth`` moves outliers of activations into weights first (`calibration.smooth_program`), where
            that pays anywhere.
        samples: Gives the batches for calibration; not called for ``dynamic``.
        alpha: Of ``static-smooth``, see `calibration.factors.choose_factors`.

    Raises:
        RequestError: There are no samples, or `alpha` is out of range.
        EnvironmentLackError: torchao is not installed.
    """
    import torch

    try:
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer
    except ImportError:
        raise missing_package("torchao", "cpu") from None
    from calibration.smooth_program import smooth_program

    program = torch.export.load(str(artifact.path))
    if program.example_inputs is None:
        raise RequestError("the program carries no example inputs", artifact.path, "Export it again")
    _, example = program.example_inputs

    def tensors(batch: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(np.ascontiguousarray(batch[name])) for name in example}

    with torch.no_grad():
        quantizer = X86InductorQuantizer()
        quantizer.set_global(_configuration(form))
        # Elementwise products have no integer kernels, so that rounding their operands gains no time; and the products
        # of masks, which are integers, cannot be quantized at all.
        quantizer.set_function_type_qconfig(torch.mul, None)
        module, smoothing = program.module(check_guards=False), None
        if form == "static-smooth":
            smoothing = smooth_program(module, map(tensors, samples()), alpha)
        observed = prepare_pt2e(module, quantizer)
        seen = 0
        if form == "dynamic":
            observed(**example)  # the ranges of the weights are taken while it runs, whatever the inputs
        else:
            for batch in samples():
                observed(**tensors(batch))
                seen += 1
            if not seen:
                raise RequestError("there are no calibration samples", form, "Give data with at least one row")
    return Calibrated(artifact, form, observed, dict(example), seen, smoothing)


def convert_program(calibrated: Calibrated, keep: Collection[str] = ()) -> fx.GraphModule:
    """The quantized module, but for the layers to `keep`, which read and write FP32. PyTorch can run it as it is.

    Raises:
        RequestError: `keep` names a layer that is not among `Calibrated.layers`, or all of them.
    """
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    layers = calibrated.layers()
    if not layers:
        raise NotApplicableError(
            "the model has no layer that can be quantized", calibrated.artifact.path, "Leave int8 out"
        )
    if unknown := sorted(set(keep) - set(layers)):
        raise RequestError("a layer to keep in FP32 is not in the program", unknown[0], "Name layers of this program")
    if len(set(keep)) == len(layers):
        raise RequestError("no layer is left to quantize", len(layers), "Keep fewer of them")
    given = calibrated.observed
    shared = {id(tensor): tensor for tensors in (given.parameters(), given.buffers()) for tensor in tensors}
    observed = deepcopy(given, shared)  # weights are read only: they stay in memory once
    nodes, modules = {node.name: node for node in observed.graph.nodes}, dict(observed.named_modules())
    for node in nodes.values():
        if (asked := node.meta.pop(Q_ANNOTATION_KEY, None)) is not None and node.name not in keep:
            # A copied node is still annotated with what the one that it was copied from reads.
            inputs = {nodes[other.name]: spec for other, spec in asked.input_qspec_map.items()}
            node.meta[Q_ANNOTATION_KEY] = replace(asked, input_qspec_map=inputs)
    for name in keep:
        for place in (0, 1):  # what was seen of its input and weight is not asked for
            if _is_observer(modules, nodes[name].args[place]):
                nodes[name].update_arg(place, nodes[name].args[place].args[0])
    observed.graph.eliminate_dead_code()
    observed.recompile()
    with torch.no_grad():
        return convert_pt2e(observed)


def write_program(calibrated: Calibrated, path_out: Path, keep: Collection[str] = ()) -> dict[str, Any]:
    """Write the quantized program; returns the record, see `quantize_program`."""
    import torch

    from exporter.onnx_export import dynamic_shapes

    converted = convert_program(calibrated, keep)
    shapes = dynamic_shapes(calibrated.artifact.signature)
    with torch.no_grad():
        again = torch.export.export(converted, (), dict(calibrated.example), dynamic_shapes=shapes, strict=False)
    torch.export.save(again, path_out)
    record = {
        "form": calibrated.form,
        "library": "torchao PT2E",
        "quantized": sum("dequantize_per_channel" in str(node.target) for node in converted.graph.nodes),
        "batches": calibrated.batches,
        "kept": [asdict(Kept(name, "linear", "asked", "asked for by name")) for name in sorted(keep)],
    }
    return record if calibrated.smoothing is None else {**record, "smoothing": calibrated.smoothing}


def _linears(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if str(node.target) == "aten.linear.default"]


def _is_observer(modules: Mapping[str, Any], node: Any) -> bool:
    from torchao.quantization.pt2e import ObserverBase

    return getattr(node, "op", "") == "call_module" and isinstance(modules[str(node.target)], ObserverBase)


def _configuration(form: Form) -> Any:
    """torchao's own for x86, with plain minima and maxima in place of its histograms, which cost minutes."""
    from torchao.quantization.pt2e import MinMaxObserver
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    found = x86.get_default_x86_inductor_quantization_config(is_dynamic=form == "dynamic")
    if form == "dynamic":
        return found
    ranges = replace(found.input_activation, observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-12))
    return replace(found, input_activation=ranges, output_activation=ranges)
