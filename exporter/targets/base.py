"""What a target and a session are: the interface that every runtime implements, and the checks made before it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from exporter.artifact import Artifact, InputContract, Signature, Variant
from exporter.errors import RequestError

Array = np.ndarray


@dataclass(frozen=True)
class Availability:
    """Whether a target can run on this machine.

    Attributes:
        available: It can be built for and opened here.
        reason: Why not (empty when it is).
        remedy: The command or step that would enable it (empty when it is).
        versions: The packages and devices it stands on, with their versions.
    """

    available: bool
    reason: str = ""
    remedy: str = ""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BuildHow:
    """What building an engine takes from a recipe beside the artifact.

    Attributes:
        points: Operating points, as lengths by axis of the signature; the engine is to be fast there.
        options: Of the builder, by name; each target says which it knows (`Target.depends_on`).
    """

    points: tuple[Mapping[str, int], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


PLAINLY = BuildHow()
"""No points, and every option as the builder has it."""


class Binding(ABC):
    """Inputs bound to a session: `run` takes nothing and copies nothing from the host, so it is what gets timed."""

    @abstractmethod
    def run(self) -> None:
        """Execute once over the bound inputs."""

    @abstractmethod
    def outputs(self) -> dict[str, Any]:
        """The outputs of the last `run` by name; each supports DLPack and stays on the session's device."""

    def host_outputs(self) -> dict[str, Array]:
        """Copies of the outputs of the last `run`, as host arrays."""
        return {name: np.array(np.from_dlpack(value)) for name, value in self.outputs().items()}


class DeviceBinding(Binding):
    """A binding of a device that works on its own while the host goes on: work is given to it, and awaited.

    `run` gives it one run and waits for the end: what somebody who asks once waits for. Runs given to it one after the
    other without waiting are what keeps it busy: `queued_seconds` times these.
    """

    def run(self) -> None:
        self.launch()
        self.wait()

    @abstractmethod
    def launch(self) -> None:
        """Give the device one run, and do not wait."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until the device has done all that it was given."""

    @abstractmethod
    def queued_seconds(self, runs: int) -> float:
        """What the device takes for each of so many runs given to it one after the other.

        By events of the device's own clock around them, where the runtime works on a stream that is known; else by the
        host's clock from the first launch to the end of the last.
        """


class Session(ABC):
    """An opened artifact.

    Subclasses implement `_bind`; `bind` checks the inputs against signature and contract first, because native code
    does not (an AOTInductor package given a length beyond its range ends the process).
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact

    def bind(self, inputs: Mapping[str, Any]) -> Binding:
        """Check `inputs` and bind them.

        Args:
            inputs: By name; anything that supports DLPack or the array protocol, with the signature's dtype.

        Raises:
            RequestError: A name, dtype, shape or value that the signature or the input contract does not allow.
        """
        arrays = check_inputs(inputs, self.artifact.signature, self.artifact.contract)
        return self._bind(arrays)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """Host arrays in, host arrays out: bind, run once, copy the outputs."""
        arrays = check_inputs(inputs, self.artifact.signature, self.artifact.contract)
        binding = self._bind_once(arrays)
        binding.run()
        return binding.host_outputs()

    @abstractmethod
    def _bind(self, arrays: dict[str, Array]) -> Binding:
        """Bind checked, C-contiguous host arrays."""

    def _bind_once(self, arrays: dict[str, Array]) -> Binding:
        """The same for a single run, where a session would prepare itself for what is bound to run often."""
        return self._bind(arrays)

    @abstractmethod
    def executed(self) -> dict[str, Any]:
        """What really runs: at least ``{"runtime": …, "device": …, "precision": …}``, asked of the runtime."""

    def close(self) -> None:  # noqa: B027 - most runtimes free everything with the object
        """Free what the session holds. The session is not used afterwards."""


class Target(ABC):
    """A runtime on a device. Register a subclass with `register_target`."""

    name: ClassVar[str]
    device: ClassVar[str] = "cpu"
    """Where it runs, as torch calls it: ``"cpu"`` or ``"cuda"``."""
    consumes: ClassVar[str]
    """Format of the artifact that `build` starts from: ``"onnx"`` or ``"pt2"``."""
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    """The precisions that it offers, simplest first."""
    forms: ClassVar[Mapping[str, tuple[str | None, ...]]] = {}
    """The forms of a precision that are made by default, simplest first; ``(None,)`` where it is not listed."""
    rare_forms: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Forms of a precision that are made on demand only."""
    keeps_timings: ClassVar[bool] = False
    """Whether its builder takes a folder of timings (option ``timing_cache``), which are read and added to."""
    portable: ClassVar[bool] = True
    """Whether what it opens runs on any machine with the runtime (portable) or only on hardware that fits (engine)."""

    @abstractmethod
    def availability(self, variant: Variant | None = None) -> Availability:
        """Look at the machine, cheaply and without side effects: for the target, or for one variant of it."""

    def buildable(self, variant: Variant) -> Availability:
        """Whether a variant can be made here as well as opened: what makes it may need more packages."""
        return self.availability(variant)

    def variants(self, precisions: Sequence[str], *, every_form: bool = False) -> list[Variant]:
        """The variants that this target offers for the asked precisions, simplest first.

        Args:
            precisions: Those asked for; others than `precisions` of this class are passed over.
            every_form: Also those of `rare_forms`.
        """
        asked = [p for p in precisions if p in self.precisions]
        rare = self.rare_forms if every_form else {}
        return [Variant(self.name, p, form) for p in asked for form in (*self.forms.get(p, (None,)), *rare.get(p, ()))]

    def opened(self, variant: Variant) -> Variant:
        """The variant whose files this one opens: another one where they differ in how they are opened only."""
        return variant

    def ingredient(self, variant: Variant) -> str:
        """Which export a variant is made from: ``<format>-<precision>[-<form>]``, as ``onnx-fp16``."""
        return "-".join(part for part in (self.consumes, variant.precision, variant.form) if part)

    def ahead(self, options: Mapping[str, Any]) -> bool:
        """Whether engines can be built here though they cannot run here, with these options of the builder."""
        return False

    def elsewhere(self, options: Mapping[str, Any]) -> str:
        """Why engines built with these options do not run here though the target does; empty where they do."""
        return ""

    def check(self, artifact: Artifact, trusted_digests: frozenset[str]) -> None:  # noqa: B027 - portable targets have none
        """Refuse an engine that is not whole, does not fit this machine or is not trusted; nothing of it is loaded.

        Raises:
            RequestError: Says what differs and what would mend it.
        """

    def depends_on(self, variant: Variant, how: BuildHow) -> dict[str, Any]:
        """What of `how` the engine depends on, as plain data; by default nothing."""
        return {}

    @abstractmethod
    def build(self, artifact: Artifact, variant: Variant, folder: Path, how: BuildHow = PLAINLY) -> list[Path]:
        """Turn `artifact` into what this target opens.

        Args:
            artifact: What it is built from.
            variant: What it is to be.
            folder: Where it is written.
            how: See `BuildHow`.

        Returns:
            Files written under `folder`, the one to open first; empty when the target opens `artifact` as it is.
        """

    @abstractmethod
    def open(
        self, artifact: Artifact, variant: Variant, *, threads: int, trusted_digests: frozenset[str] = frozenset()
    ) -> Session:
        """Open what `build` made (or `artifact` itself) with `threads` compute threads.

        Args:
            artifact: Its path is the file to open; signature and contract are what the session checks.
            variant: The variant that it realises.
            threads: Compute threads of the runtime.
            trusted_digests: SHA-256 digests of the engines that may be opened. Engines are native code: one that is not
                listed is refused. Portable targets ignore it.

        Raises:
            RequestError: The engine is not trusted, or does not fit this machine (says what differs).
            EnvironmentLackError: The runtime is not installed.
        """


_TARGETS: dict[str, Target] = {}
TargetClass = TypeVar("TargetClass", bound=type[Target])


def register_target(cls: TargetClass) -> TargetClass:
    """Class decorator: make a target known under its `name`."""
    _TARGETS[cls.name] = cls()
    return cls


def targets() -> dict[str, Target]:
    """All registered targets by name, in order of registration."""
    import exporter.targets  # noqa: F401 - registers them

    return dict(_TARGETS)


def get_target(name: str) -> Target:
    """The target called `name`.

    Raises:
        RequestError: There is none of that name.
    """
    known = targets()
    if name not in known:
        raise RequestError("unknown target", name, f"Known targets: {', '.join(known)}")
    return known[name]


def check_inputs(inputs: Mapping[str, Any], signature: Signature, contract: InputContract) -> dict[str, Array]:
    """Check inputs against what the model accepts, and return them as C-contiguous NumPy arrays.

    Raises:
        RequestError: Names the input, what it was and what is accepted.
    """
    expected = {spec.name: spec for spec in signature.inputs}
    if missing := [name for name in expected if name not in inputs]:
        raise RequestError("an input is missing", ", ".join(missing), f"The model takes: {', '.join(expected)}")
    if extra := [name for name in inputs if name not in expected]:
        raise RequestError("an input is not known", ", ".join(extra), f"The model takes: {', '.join(expected)}")
    lengths: dict[str, tuple[int, str]] = {}
    arrays: dict[str, Array] = {}
    for name, spec in expected.items():
        array = _as_array(inputs[name])
        if array.dtype != np.dtype(spec.dtype):
            raise RequestError(f"input {name!r} has the wrong dtype", array.dtype, f"It must be {spec.dtype}")
        _check_shape(name, array, spec.shape, signature, lengths)
        if name in contract.id_ranges and array.size:
            _check_range(name, array, *contract.id_ranges[name])
        arrays[name] = np.ascontiguousarray(array)
    if contract.attends and contract.mask in arrays:
        mask = arrays[contract.mask] != 0
        rows = mask.any(axis=tuple(range(1, mask.ndim)))
        if not rows.all():
            raise RequestError(
                f"a row of {contract.mask!r} attends to no token",
                f"row {int(np.argmin(rows))}",
                "The input contract promises at least one; drop the row, or export with contract.attends: false",
            )
    return arrays


def _as_array(value: Any) -> Array:
    """`value` as a plain array: a masked one's hidden values are what native code would read."""
    if not isinstance(value, np.ndarray) and hasattr(value, "__dlpack__"):
        return np.from_dlpack(value)
    return np.asarray(value)


def _check_range(name: str, array: Array, low: int, high: int) -> None:
    smallest, largest = array.min(), array.max()  # NaN, if any, is both
    if smallest >= low and largest <= high:
        return
    value = largest if smallest >= low else smallest
    raise RequestError(f"input {name!r} holds a value out of range", value.item(), f"It accepts {low} to {high}")


def _check_shape(
    name: str, array: Array, shape: tuple[int | str, ...], signature: Signature, lengths: dict[str, tuple[int, str]]
) -> None:
    if array.ndim != len(shape):
        raise RequestError(f"input {name!r} has the wrong number of dimensions", array.shape, f"It must be {shape}")
    for actual, wanted in zip(array.shape, shape, strict=True):
        if isinstance(wanted, int):
            if actual != wanted:
                raise RequestError(f"input {name!r} has the wrong shape", array.shape, f"It must be {shape}")
            continue
        axis = signature.axis(wanted)
        if not axis.min <= actual <= axis.max:
            raise RequestError(
                f"axis {wanted!r} of input {name!r} is out of range", actual, f"It accepts {axis.min} to {axis.max}"
            )
        first, where = lengths.setdefault(wanted, (actual, name))
        if actual != first:
            raise RequestError(
                f"axis {wanted!r} differs between inputs", f"{first} in {where!r}, {actual} in {name!r}", "Pad alike"
            )


def output_shapes(signature: Signature, arrays: Mapping[str, Array]) -> dict[str, tuple[int, ...] | None]:
    """The shape of each output for these inputs; ``None`` where an axis of it does not stand in any input."""
    lengths: dict[str, int] = {}
    for spec in signature.inputs:
        for axis, length in zip(spec.shape, arrays[spec.name].shape, strict=True):
            if isinstance(axis, str):
                lengths[axis] = length
    shapes: dict[str, tuple[int, ...] | None] = {}
    for spec in signature.outputs:
        known = [lengths.get(axis) if isinstance(axis, str) else axis for axis in spec.shape]
        shapes[spec.name] = None if None in known else tuple(length for length in known if length is not None)
    return shapes
