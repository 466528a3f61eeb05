"""The sections of a recipe, as frozen and validated data."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from exporter.sources.source import LONGEST_NAME
from pipelines.recipe_errors import Wrong

DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")

# YAML has types of its own: "10" is text and true is no number, so nothing is converted in silence.
Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]
Count = Annotated[Int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]
# A name of a folder or a log, and never a way to one elsewhere.
BundleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=LONGEST_NAME)]
Point = Annotated[str, Field(min_length=1)]
Column = Annotated[
    Name,
    BeforeValidator(lambda value: str(value) if type(value) is int and value >= 0 else value),
    WithJsonSchema({"type": ["string", "integer"], "minLength": 1, "minimum": 0}),
]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Export(Section):
    """How the ONNX model is made.

    Attributes:
        opset: Version of the ONNX operator set.
        max_batch: The largest batch that it must take.
        max_length: The longest sequence that it must take.
        external_data: Weights in a file beside the graph: ``auto`` does so beyond protobuf's limit of 2 GB.
    """

    opset: Annotated[Int, Field(ge=18, le=22)] = 20
    external_data: Literal["auto", "always"] = "auto"
    max_batch: Count | None = None
    max_length: Count | None = None


class Contract(Section):
    """What callers promise about inputs. `attends`: every row attends to at least one token."""

    attends: Bool = True


class CustomInput(Section):
    """One input of a `custom` model: NumPy dtype name; a dimension is a size or the name of a dynamic axis."""

    dtype: str
    shape: tuple[int | str, ...]

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str) -> str:
        if value not in DTYPES:
            raise Wrong("unknown choice", value, f"Choose one of: {', '.join(DTYPES)}")
        return value

    @field_validator("shape", mode="before")
    @classmethod
    def _sizes_or_names(cls, shape: Any) -> Any:
        for dim in shape if isinstance(shape, list | tuple) else ():
            if not (dim if isinstance(dim, str) else type(dim) is int and dim > 0):
                raise Wrong("not a dimension", dim, "It must be a size of at least 1 or the name of an axis")
        return shape


class CustomAxis(Section):
    """The lengths that a dynamic axis takes, both ends included."""

    min: Count = 1
    max: Count

    @model_validator(mode="after")
    def _ordered(self) -> CustomAxis:
        if self.min > self.max:
            raise Wrong("above max", self.min, f"It must be at most {self.max}", "min")
        return self


class Custom(Section):
    """Declared inputs, outputs and dynamic axes of a `custom` model, in the order of its forward function."""

    inputs: dict[Name, CustomInput] = Field(min_length=1)
    outputs: tuple[Name, ...] = Field(min_length=1)
    axes: dict[Name, CustomAxis] = {}

    @model_validator(mode="after")
    def _axes_declared(self) -> Custom:
        used = {dim for item in self.inputs.values() for dim in item.shape if isinstance(dim, str)}
        if undeclared := sorted(used - set(self.axes)):
            raise Wrong("an axis is used and not declared", undeclared[0], "Add it here with its max", "axes")
        if unused := sorted(set(self.axes) - used):
            raise Wrong("an axis is declared and not used", unused[0], "Use it in a shape or remove it", "axes")
        return self


def _refuse_without_data(section: Data | Calibration, given: str | None, where: str) -> None:
    """What describes the user's data says nothing where none are given."""
    for key in ("columns", "split", "sha256"):
        if given is None and (value := getattr(section, key)):
            raise Wrong("there is no data for it", value, f"Give the data too: {where}", key)


class Data(Section):
    """Evaluation data: CSV, JSONL, Parquet, ``.npz`` or a `datasets` folder.

    Attributes:
        evaluation: Path of the data; `None` takes Planish's own sentences.
        columns: Role (``text``, ``label`` …) to the column that plays it: its name, or its position from 0 in a CSV or
            TSV file without a header line.
        limit: Rows taken at most, drawn evenly at random by the recipe's `seed`.
        split: Split of a `datasets` folder.
        sha256: Digest of the data (filled in by `Recipe.resolved`); where given, the data must have it.
    """

    evaluation: Name | None = None
    columns: dict[Name, Column] = {}
    limit: Count | None = None
    split: Name | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _about_given_data(self) -> Data:
        _refuse_without_data(self, self.evaluation, "data.evaluation, or --data")
        return self


class Calibration(Section):
    """What int8 forms with fixed ranges learn them from.

    Attributes:
        data: Path of the data; `None` takes Planish's own sentences, pictures or tensors. Rows that quality is judged
            on should not be among them. A recipe that compresses and says nothing takes what it trains on.
        columns: As in `Data`, and where none are given those of `Data`.
        split: Split of a `datasets` folder.
        samples: Rows at most, spread over the lengths of the data and unlike each other, by the recipe's `seed`.
        method: How a range is chosen from what was seen; `None` takes what suits each target.
        smooth_alpha: SmoothQuant's alpha, between 0 and 1: how much of an activation's range its weights take over
            where a form is smoothed; `None` takes for each group of products what promises the least rounding error.
        tables: Store large embedding tables as int8 too, with a step per row, in forms of ONNX Runtime and OpenVINO.
        search: Where a form fails its quality gate, look for the fewest layers to keep in FP32 such that it passes.
        sha256: As in `Data`.
    """

    data: Name | None = None
    columns: dict[Name, Column] = {}
    split: Name | None = None
    samples: Count = 256
    method: Literal["minmax", "percentile", "entropy", "mse"] | None = None
    smooth_alpha: Annotated[Float, Field(gt=0, lt=1)] | None = None
    tables: Bool = True
    search: Bool = True
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _about_given_data(self) -> Calibration:
        _refuse_without_data(self, self.data, "calibration.data")
        return self


class Parity(Section):
    """Numerical comparison with the original: real samples taken beside the shape envelope."""

    samples: Count = 32


class Quality(Section):
    """Task metric as a paired difference to the original, in points (hundredths of the metric's full scale)."""

    metric: Name | None = None
    max_drop: Annotated[Float, Field(ge=0)] = 0.5
    max_drop_worst: Annotated[Float, Field(ge=0)] | None = None
    bootstrap: Annotated[Int, Field(ge=100, le=1_000_000)] = 1000

    @model_validator(mode="after")
    def _ordered(self) -> Quality:
        if self.max_drop_worst is not None and self.max_drop_worst < self.max_drop:
            remedy = f"It must be at least max_drop, {self.max_drop}"
            raise Wrong("out of range", self.max_drop_worst, remedy, "max_drop_worst")
        return self


class Latency(Section):
    """Timing: operating points (batch x sequence, or batch alone), time budget in seconds, shortest block in ms.

    An ONNX source has no PyTorch baselines: it is timed itself, on ONNX Runtime. Without any baseline variants are
    compared with the portable one.
    """

    points: tuple[Point, ...] = Field(default=("1x16", "1x32", "1x128", "8x128"), min_length=1)
    budget_s: Annotated[Float, Field(gt=0)] = 75.0
    min_block_ms: Annotated[Float, Field(gt=0)] = 50.0
    min_speedup: Annotated[Float, Field(gt=0)] | None = None
    baselines: tuple[Literal["eager", "compile"], ...] = ("eager", "compile")

    @field_validator("points")
    @classmethod
    def _readable_points(cls, points: tuple[str, ...]) -> tuple[str, ...]:
        for point in points:
            parse_point(point)
        return no_twice(points)

    @field_validator("baselines")
    @classmethod
    def _baselines_once(cls, baselines: tuple[str, ...]) -> tuple[str, ...]:
        return no_twice(baselines)

    @model_validator(mode="after")
    def _comparable(self) -> Latency:
        if self.min_speedup is not None and not self.baselines:
            raise Wrong(
                "there is no baseline to compare with", self.min_speedup, "Add eager to baselines", "min_speedup"
            )
        return self


def _gpu(value: Any) -> str:
    """``"8.9"``, also from ``"SM89"``, ``"sm_89"`` and the number that YAML makes of ``8.9``."""
    found = re.fullmatch(r"(\d{1,2})\.(\d)|sm_?(\d{1,2})(\d)", str(value), re.IGNORECASE)
    if found is None:
        raise Wrong("not a compute capability", value, 'Write them as ["8.9", "12.0"]')
    return ".".join(part for part in found.groups() if part)


class Engine(Section):
    """How TensorRT's builder builds engines; what the installed version lacks is refused. Nothing set: as it does.

    Attributes:
        gpus: Compute capabilities to build for without having them (``8.9``), which TensorRT for RTX can; none: this
            machine's GPU.
        level: Optimization level: higher takes longer to build.
        workspace_bytes: Most scratch memory that a layer may ask for.
        sparse_weights: Use kernels for weights that are 2:4 sparse.
        version_compatible: The engine also runs with later minor versions of TensorRT.
        hardware_compatible: The engine also runs on other GPUs.
        refit: Weights can be replaced afterwards.
        weight_streaming: Weights may stay in host memory.
        timeout_s: A build that takes longer is ended.
        memory_bytes: A build that holds more is ended.
    """

    gpus: tuple[Annotated[str, Field(pattern=r"^\d{1,2}\.\d$"), BeforeValidator(_gpu)], ...] = ()
    level: Annotated[Int, Field(ge=0, le=5)] | None = None
    workspace_bytes: Count | None = None
    sparse_weights: Bool = False
    version_compatible: Bool = False
    hardware_compatible: Literal["AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"] | None = None
    refit: Bool = False
    weight_streaming: Bool = False
    timeout_s: Annotated[Float, Field(gt=0)] | None = None
    memory_bytes: Count | None = None

    @field_validator("gpus")
    @classmethod
    def _gpus_once(cls, gpus: tuple[str, ...]) -> tuple[str, ...]:
        return no_twice(gpus)

    def options(self) -> dict[str, Any]:
        """Those that are set, by the names of `exporter.targets.tensorrt_builder.EngineOptions`."""
        found = self.model_dump(exclude_defaults=True)
        if gpus := found.pop("gpus", ()):
            found["compute_capabilities"] = tuple(f"SM{gpu.replace('.', '')}" for gpu in gpus)
        return found


def parse_point(point: str) -> tuple[int, int | None]:
    """``"8x128"`` as ``(8, 128)`` (batch, sequence length); ``"8"`` as ``(8, None)``.

    Raises:
        ValueError: It is neither.
    """
    match = re.fullmatch(r"([1-9]\d{0,6})(?:x([1-9]\d{0,6}))?", point)
    if match is None:
        remedy = "Write batch x sequence length, as 8x128, or the batch alone"
        raise Wrong("not an operating point", point, remedy)
    return int(match[1]), int(match[2]) if match[2] else None


def no_twice(values: tuple[str, ...]) -> tuple[str, ...]:
    if twice := [value for i, value in enumerate(values) if value in values[:i]]:
        raise Wrong("listed twice", twice[0], "Keep one")
    return values
