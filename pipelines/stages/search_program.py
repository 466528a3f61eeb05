"""Stage: the fewest layers of a quantized `torch.export` program to keep in FP32, such that its quality gate passes."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.sensitivity import Layer
from pipelines.processes import report_progress
from pipelines.stages.search import Trials, run_search

if TYPE_CHECKING:
    from exporter.targets.base import Session


def search_kept(arguments: dict[str, Any]) -> dict[str, Any]:
    """Search, and leave the program that was found, which is still to be compiled.

    Every trial runs in PyTorch, where each Q/DQ pair is computed as it stands: to compile each of some dozens would
    take too long. So layers are not timed, and the gate looks at the compiled form once more in the end.

    Args:
        arguments: ``artifact`` (the FP32 program), ``precision``, ``form``, ``alpha`` (as `quantize.program` has it),
            ``name`` (of the file); of calibration ``original``, ``data``, ``samples``, ``seed``; of the gate
            ``recorded``, ``evaluation`` (its data), ``settings``; ``point`` (null), ``threads``, ``folder``.

    Returns:
        As `pipelines.stages.search.search_kept`.
    """
    return run_search(arguments, ProgramTrials)


class ProgramTrials(Trials):
    """Trials of programs. A form is a session already: nothing of it lies on the disk."""

    def layers(self) -> list[Layer]:
        """What the plain form quantizes; calibrates on the way, once for all trials."""
        from calibration.quantize.program import calibrate_program

        form = self.arguments["form"]
        report_progress("calibrating")
        samples = tuple if form == "dynamic" else self.samples
        self.calibrated = calibrate_program(self.base, form=form, samples=samples, alpha=self.arguments["alpha"])
        return [Layer(name, "linear", shape) for name, shape in self.calibrated.layers().items()]

    def make(self, keep: Collection[str]) -> Session:
        from calibration.quantize.program import convert_program

        return self._session(convert_program(self.calibrated, keep))

    def quantize(self, path: Path, keep: Collection[str]) -> dict[str, Any]:
        from calibration.quantize.program import write_program

        return write_program(self.calibrated, path, keep)

    def _open(self, form: Any, precision: str) -> Session:
        if precision != "fp32":
            opened: Session = form
            return opened
        import torch

        return self._session(torch.export.load(str(form.path)).module(check_guards=False))

    def _session(self, module: Any) -> Session:
        from exporter.targets.pytorch import ProgramSession

        return ProgramSession(self.base, module, threads=int(self.arguments["threads"]))

    def _close(self, session: Session) -> None:
        session.close()
