"""Stage: the fewest layers of a quantized form to keep in FP32, such that its quality gate passes."""

from __future__ import annotations

import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.sensitivity import Judgement, Layer, search
from exporter.artifact import Artifact, Variant
from pipelines.processes import report_progress
from pipelines.stages.check import check_quality
from pipelines.stages.quantize import batches, open_rows, write_dynamic, write_static, write_weight_only

if TYPE_CHECKING:
    from exporter.targets.base import Session

BATCHES = 8
"""Calibration batches on which the error of the outputs is measured."""
TIMED_SECONDS = 0.4


def search_kept(arguments: dict[str, Any]) -> dict[str, Any]:
    """Search, and leave the form that was found.

    Args:
        arguments: ``artifact`` (the FP32 graph), ``precision``, ``form``, ``runner`` (target and form of the session
            that runs it), ``name`` (of the file), ``table``, ``scheme`` and ``method`` (null where none is learned
            from), ``tables``, ``external_data``; of calibration ``original``, ``data``, ``samples``, ``seed``; of the
            gate ``recorded``, ``evaluation`` (its data), ``settings``; ``point`` (the inputs to time with, or null),
            ``threads``, ``folder``.

    Returns:
        ``path`` of the form, and ``record``: that of the quantization, with ``search`` (`calibration.sensitivity`).
    """
    return run_search(arguments, Trials)


def run_search(arguments: dict[str, Any], kind: type[Trials]) -> dict[str, Any]:
    """Search with one kind of trials (see `search_kept`)."""
    with tempfile.TemporaryDirectory(prefix="forms-", dir=arguments["folder"]) as scratch:
        trials = kind(arguments, Path(scratch))
        found = search(
            trials.layers(),
            trials.make,
            measure=trials.error,
            evaluate=trials.judge,
            time=None if arguments["point"] is None else trials.seconds,
            on_line=report_progress,
        )
    made = Path(arguments["folder"])
    record = trials.quantize(made / trials.file, found.kept)
    told = {cost.layer.name: cost for cost in found.costs}
    for entry in record["kept"]:
        if (cost := told.get(entry["node"])) is not None and cost.kept:
            entry["rule"] = "sensitivity"
            alone = f"output error {cost.error:.2g} with it alone in {trials.precision}"
            entry["why"] = f"{cost.cost:.0%} of what all layers cost: {alone}"
    return {"path": trials.file, "record": {"precision": trials.precision, **record, "search": found.to_dict()}}


class Trials:
    """Makes forms, runs them, and says what became of the outputs: ONNX files, run by ONNX Runtime or OpenVINO."""

    def __init__(self, arguments: dict[str, Any], scratch: Path) -> None:
        self.arguments = arguments
        self.scratch = scratch
        self.precision = arguments["precision"]
        self.file = arguments["name"]
        self.base = Artifact.from_dict(arguments["artifact"])
        self.numbers = itertools.count()
        self.samples = batches(arguments, open_rows(arguments))
        self.inputs = list(itertools.islice(self.samples(), BATCHES))
        session = self._open(self.base, "fp32")
        self.expected = [session.run(one) for one in self.inputs]
        session.close()

    def layers(self) -> list[Layer]:
        """What the plain form quantizes."""
        path = self.scratch / "plain" / self.file
        path.parent.mkdir()
        record = self.quantize(path, ())
        shutil.rmtree(path.parent)
        from calibration.quantize.products import weight_of
        from exporter.onnx_files import load_model

        nodes = {str(node.name): node for node in load_model(self.base.path).graph}
        found = []
        for entry in record["quantized"]:
            weight = weight_of(nodes[entry["node"]])
            shape = None if weight is None or weight.shape is None else tuple(weight.shape.numpy())
            found.append(Layer(entry["node"], entry["op"], shape))
        return found

    def make(self, keep: Collection[str]) -> Any:
        """The form with these layers in FP32, as the methods below take it: here its file."""
        folder = self.scratch / str(next(self.numbers))
        folder.mkdir()
        self.quantize(folder / self.file, keep)
        return replace(self.base, path=folder / self.file)

    def quantize(self, path: Path, keep: Collection[str]) -> dict[str, Any]:
        if self.arguments["form"] in (None, "weights"):
            return write_weight_only(self.arguments, path, keep)
        write = write_dynamic if self.arguments["table"] is None else write_static
        return write(self.arguments, path, keep)

    def error(self, form: Any) -> float:
        """RMS relative error of the outputs on the calibration batches, the worst output's."""
        session = self._open(form, self.precision)
        apart = dict.fromkeys(self.expected[0], 0.0)
        size = dict(apart)
        for inputs, expected in zip(self.inputs, self.expected, strict=True):
            found = session.run(inputs)
            for name, value in expected.items():
                wide = value.astype(np.float64)
                apart[name] += float(np.square(found[name] - wide).sum())
                size[name] += float(np.square(wide).sum())
        self._close(session)
        return max((apart[name] / (size[name] or 1.0)) ** 0.5 for name in apart)

    def judge(self, form: Any) -> Judgement:
        """The quality gate, as it judges the form in the end."""
        asked = self.arguments
        session = self._open(form, self.precision)
        artifact, rows = session.artifact, {**asked, "data": asked["evaluation"]}
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            record = check_quality(
                session, Path(asked["recorded"]), Path(folder), rows, artifact.signature, artifact.contract
            )
        self._close(session)
        return Judgement(record["verdict"] == "passed", behind(record), record["reason"])

    def seconds(self, form: Any) -> float:
        """The median of some runs in this process: enough to rank layers, no figure to publish."""
        from pipelines.verification.worker import load_inputs

        session = self._open(form, self.precision)
        binding = session.bind(load_inputs(Path(self.arguments["point"])))
        binding.run()
        times: list[float] = []
        end = time.perf_counter() + TIMED_SECONDS
        while len(times) < 5 or time.perf_counter() < end:
            begun = time.perf_counter()
            binding.run()
            times.append(time.perf_counter() - begun)
        self._close(session)
        return statistics.median(times)

    def _open(self, form: Any, precision: str) -> Session:
        from exporter.targets import get_target

        target, opened = self.arguments["runner"]
        variant = Variant(target, precision, None if precision == "fp32" else opened)
        return get_target(target).open(form, variant, threads=int(self.arguments["threads"]))

    def _close(self, session: Session) -> None:
        """End a trial: its form has been looked at, and is needed no more."""
        path = session.artifact.path
        session.close()
        shutil.rmtree(path.parent)


def behind(record: dict[str, Any]) -> float:
    """How far a quality record is behind: points lost on labelled data, else how much agreement lacks, in percent."""
    if record["difference"] is not None:
        return -float(record["difference"])
    lacking = [
        100 * (measure["threshold"] - measure["value"])
        for measure in record["measures"]
        if measure["threshold"] is not None and measure["value"] is not None
    ]
    return max(lacking, default=float("inf"))
