"""What flows between the stages: signatures, input contracts, variants and artifacts. Plain data, no heavy imports."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4"]
PRECISIONS: tuple[str, ...] = ("fp32", "fp16", "bf16", "int8", "fp8", "int4")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model.

    Attributes:
        name: The tensor's name in the graph.
        dtype: NumPy's name of the element type (``"int64"``, ``"float32"``).
        shape: One entry per dimension: an ``int`` is fixed, a ``str`` names a dynamic axis (see `Signature.axes`).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Axis:
    """A named dynamic axis and the lengths it accepts, both ends included."""

    name: str
    min: int
    max: int


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a model, in the order in which the graph has them, and its dynamic axes."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: tuple[Axis, ...] = ()

    def axis(self, name: str) -> Axis:
        """The axis called `name` (`KeyError` if there is none)."""
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise KeyError(name)

    @property
    def length(self) -> Axis | None:
        """The axis that the second number of an operating point such as ``8x128`` means: the only dynamic one of the
        inputs besides ``batch``, whatever its name; ``None`` where there is none, or where there are several."""
        used = {dim for spec in self.inputs for dim in spec.shape}
        others = [axis for axis in self.axes if axis.name != "batch" and axis.name in used]
        return others[0] if len(others) == 1 else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Signature:
        def specs(items: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(i["name"], i["dtype"], tuple(i["shape"])) for i in items)

        return cls(specs(data["inputs"]), specs(data["outputs"]), tuple(Axis(**a) for a in data.get("axes", ())))


@dataclass(frozen=True)
class InputContract:
    """What the caller promises about inputs; sessions check it before native code sees them.

    Attributes:
        attends: Every row of `mask` has at least one non-zero entry. Only under this promise may a pass drop the
            guards against a softmax over nothing.
        mask: Name of the attention-mask input, or ``None`` where the model has none.
        id_ranges: Per integer input, the smallest and largest value accepted (both included), e.g. token ids.
    """

    attends: bool = False
    mask: str | None = None
    id_ranges: dict[str, tuple[int, int]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "attends": self.attends,
            "mask": self.mask,
            "id_ranges": {k: list(v) for k, v in self.id_ranges.items()},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> InputContract:
        ranges = {name: (int(low), int(high)) for name, (low, high) in data.get("id_ranges", {}).items()}
        return cls(bool(data.get("attends", False)), data.get("mask"), ranges)


@dataclass(frozen=True)
class Variant:
    """One candidate: a target, a precision and, where a precision can be realised in several ways, a form."""

    target: str
    precision: str
    form: str | None = None

    @property
    def id(self) -> str:
        """``<target>-<precision>[-<form>]``, as ``onnxruntime-cpu-int8-dynamic``."""
        return "-".join(part for part in (self.target, self.precision, self.form) if part)


@dataclass(frozen=True)
class Artifact:
    """A model on disk, ready for a pass, a builder or a runtime.

    Attributes:
        path: The file that a runtime opens; external data lies beside it.
        format: ``"onnx"``, ``"pt2"`` (a `torch.export` program) or ``"aoti"`` (a compiled AOTInductor package).
        signature: Inputs, outputs and dynamic axes.
        contract: What callers promise about the inputs.
    """

    path: Path
    format: str
    signature: Signature
    contract: InputContract

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "format": self.format,
            "signature": self.signature.to_dict(),
            "contract": self.contract.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Artifact:
        return cls(
            Path(data["path"]),
            data["format"],
            Signature.from_dict(data["signature"]),
            InputContract.from_dict(data["contract"]),
        )
