"""Int8 for AOTInductor: a `torch.export` program with quantized products, by torchao's PT2E, in the form that fuses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from exporter.artifact import Artifact
from exporter.errors import NotApplicableError, RequestError, missing_package

Form = Literal["static", "static-smooth", "dynamic"]


def quantize_program(
    artifact: Artifact,
    path_out: Path,
    *,
    form: Form,
    samples: Callable[[], Iterable[Mapping[str, np.ndarray]]],
    alpha: float | None = None,
) -> dict[str, Any]:
    """Quantize the linear layers of a program: uint8 activations, int8 weights with a step per output channel.

    Args:
        artifact: A ``.pt2`` program in FP32; its signature says what may be dynamic.
        path_out: Where the quantized program goes.
        form: ``static`` takes ranges from `samples` (smallest and largest value seen), ``dynamic`` from each batch;
            ``static-smooth`` moves outliers of activations into weights first (`calibration.smooth_program`).
        samples: Gives the batches for calibration; not called for ``dynamic``.
        alpha: Of ``static-smooth``, see `calibration.factors.choose_factors`.

    Returns:
        The record: ``quantized`` (how many products have integer inputs) and the form; ``smoothing`` where it was done.

    Raises:
        RequestError: There are no samples, nothing could be quantized, or `alpha` is out of range.
        EnvironmentLackError: torchao is not installed.
    """
    import torch

    try:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer
    except ImportError:
        raise missing_package("torchao", "cpu") from None
    from calibration.smooth_program import smooth_program
    from exporter.onnx_export import dynamic_shapes

    program = torch.export.load(str(artifact.path))
    if program.example_inputs is None:
        raise RequestError("the program carries no example inputs", artifact.path, "Export it again")
    _, example = program.example_inputs

    def tensors(batch: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(np.ascontiguousarray(batch[name])) for name in example}

    with torch.no_grad():
        quantizer = X86InductorQuantizer()
        quantizer.set_global(_configuration(form))
        module, smoothing = program.module(check_guards=False), {}
        if form == "static-smooth":
            smoothing = {"smoothing": smooth_program(module, map(tensors, samples()), alpha)}
        prepared = prepare_pt2e(module, quantizer)
        seen = 0
        if form == "dynamic":
            prepared(**example)  # the ranges of the weights are taken while it runs, whatever the inputs
        else:
            for batch in samples():
                prepared(**tensors(batch))
                seen += 1
            if not seen:
                raise RequestError("there are no calibration samples", form, "Give data with at least one row")
        converted = convert_pt2e(prepared)
        quantized = sum("dequantize_per_channel" in str(node.target) for node in converted.graph.nodes)
        if not quantized:
            raise NotApplicableError("the model has no layer that can be quantized", artifact.path, "Leave int8 out")
        again = torch.export.export(
            converted, (), dict(example), dynamic_shapes=dynamic_shapes(artifact.signature), strict=False
        )
    torch.export.save(again, path_out)
    return {"form": form, "library": "torchao PT2E", "quantized": quantized, "batches": seen, "kept": [], **smoothing}


def _configuration(form: Form) -> Any:
    """torchao's own for x86, with plain minima and maxima in place of its histograms, which cost minutes."""
    from torchao.quantization.pt2e import MinMaxObserver
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    found = x86.get_default_x86_inductor_quantization_config(is_dynamic=form == "dynamic")
    if form == "dynamic":
        return found
    ranges = replace(found.input_activation, observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-12))
    return replace(found, input_activation=ranges, output_activation=ranges)
