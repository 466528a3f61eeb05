"""What variants are timed against, by the name that recipes and reports use.

A PyTorch source is timed in eager mode and under `torch.compile`; where variants run on a GPU it is timed there, and in
FP16 under `torch.compile` too, which is what people do who have one. An ONNX source has no PyTorch form: there the
source itself is timed, on ONNX Runtime's CPU provider as it opens any file.
"""

from __future__ import annotations

from collections.abc import Sequence

EAGER = "eager"
COMPILE = "compile"
COMPILE_HALF = "compile-fp16"
ONNX_SOURCE = "onnx"
PYTORCH = (EAGER, COMPILE, COMPILE_HALF)
PORTABLE = "onnxruntime-cpu-fp32"
"""The variant that runs everywhere: the bundle's FP32 ONNX on ONNX Runtime's CPU provider."""

_LABELS = {
    EAGER: "eager PyTorch",
    COMPILE: "torch.compile",
    COMPILE_HALF: "torch.compile FP16",
    ONNX_SOURCE: "the ONNX source",
}
_SHORT_LABELS = {**_LABELS, EAGER: "eager", ONNX_SOURCE: "source"}


def baselines_of(source_kind: str, wanted: Sequence[str], device: str = "cpu") -> tuple[str, ...]:
    """The baselines of a source of that kind, where the recipe wants `wanted`; none where it wants none.

    Args:
        source_kind: Of the source.
        wanted: Of ``eager`` and ``compile``.
        device: Where the best of the variants run, and so the baselines: ``"cpu"`` or ``"cuda"``.
    """
    if source_kind == "onnx":
        return (ONNX_SOURCE,) if wanted else ()
    half = (COMPILE_HALF,) if device == "cuda" and COMPILE in wanted else ()
    return (*wanted, *half)


def reference_of(names: Sequence[str]) -> str:
    """Which of the timed sessions speed-ups are against: a baseline, or else a variant, the portable one first.

    Args:
        names: Of baselines and variants, at least one.
    """
    return next((name for name in (EAGER, ONNX_SOURCE, COMPILE, PORTABLE) if name in names), names[0])


def label(name: str) -> str:
    """What to call a baseline in a sentence; a variant is called by its id."""
    return _LABELS.get(name, name)


def short_label(name: str) -> str:
    """What to call a baseline in the heading of a column."""
    return _SHORT_LABELS.get(name, name)
