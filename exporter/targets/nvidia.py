"""What NVIDIA's targets have in common: whether the driver, a GPU and their packages are here, and how to get them."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import re
from pathlib import Path
from typing import ClassVar

from exporter.artifact import Variant
from exporter.errors import EnvironmentLackError
from exporter.targets.base import Availability, Target
from exporter.targets.packages import installed_version

DRIVER = "a machine with an NVIDIA GPU and its driver (nvidia-smi shows both; a container has to be given the GPU)"

TORCH_WITH_CUDA = "Install a CUDA build of torch (docs/nvidia.md says where from)"


def has_driver() -> bool:
    """Whether NVIDIA's driver library is on this machine. Nothing is loaded."""
    return ctypes.util.find_library("cuda") is not None or os.path.exists("/proc/driver/nvidia/version")


def torch_cuda() -> str | None:
    """The version of CUDA that the installed torch was built for (``"13.0"``), or ``None``. Nothing is imported."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


class NvidiaTarget(Target):
    """A target that needs an NVIDIA GPU to run."""

    device = "cuda"
    packages: ClassVar[tuple[str, ...]]
    """Distributions of which one brings the runtime."""
    install: ClassVar[str]
    """How to get it."""

    def lacks(self) -> list[tuple[str, str]]:
        """What else is missing beside driver and package, each with how to get it."""
        return []

    def without_cuda(self) -> list[tuple[str, str]]:
        """What to say where torch, which holds the memory on the device, has no CUDA."""
        if torch_cuda() or installed_version("torch") is None:
            return []
        return [("torch was built without CUDA", TORCH_WITH_CUDA)]

    def require(self) -> None:
        """Refuse to build or open where something is missing.

        Raises:
            EnvironmentLackError: Says what, and how to get it.
        """
        state = self.availability()
        if not state.available:
            raise EnvironmentLackError("this target cannot run here", f"{self.name}: {state.reason}", state.remedy)

    def missing(self) -> list[tuple[str, str]]:
        """All that is missing here, each with how to get it: the driver, the package, what a target asks for beside."""
        found: list[tuple[str, str]] = []
        if not has_driver():
            found.append(("there is no NVIDIA driver on this machine", f"Run on {DRIVER}"))
        if installed_version(*self.packages) is None:
            found.append((f"{self.packages[0]} is not installed", self.install))
        return [*found, *self.lacks()]

    def availability(self, variant: Variant | None = None) -> Availability:
        """Whether nothing is `missing`; all that is, told at once."""
        found = installed_version(*self.packages)
        versions = {} if found is None else {self.packages[0]: found}
        missing = self.missing()
        if not missing:
            return Availability(True, versions=versions)
        reason = "; ".join(what for what, _ in missing)
        return Availability(False, reason, "; ".join(dict.fromkeys(how for _, how in missing if how)), versions)
