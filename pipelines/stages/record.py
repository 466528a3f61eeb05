"""Stage: what the original does: parity cases, noise floors, predictions, and the inputs of operating points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.artifact import InputContract, Signature
from exporter.errors import RequestError
from pipelines.processes import report_progress
from pipelines.recipe import parse_point
from pipelines.stages import files
from pipelines.stages.data import BATCH_SIZE, open_data, open_labels, open_problem, refuse_unknown_labels

if TYPE_CHECKING:
    from calibration.datasets import Dataset
    from exporter.original import Original
    from pipelines.verification.envelope import Case

FLOOR_ELEMENTS = 1024
"""Input elements up to which a case is used for the noise floor; larger ones take the pooled value."""
DEFAULT_LENGTH = 32
"""The length that is suggested where a model takes it."""


def record(arguments: dict[str, Any]) -> dict[str, Any]:
    """Run the original over everything that variants are compared on.

    Args:
        arguments: ``original``, ``data`` (see `open_data`), ``samples`` (rows for parity), ``seed``, ``points``
            (labels), ``points_given`` (they are the user's own, not the default), ``precisions`` (whose noise floors
            are wanted), ``folder``.

    Returns:
        ``signature``, ``contract``, ``points`` (those that this model takes), ``dropped_points`` (why not the others),
        ``data`` (origin, digest, rows, labelled), ``labels``, ``parameters``, ``cases`` (how many).

    Raises:
        RequestError: The model takes none of the points that the user gave, or the source or the data are wrong.
    """
    from exporter.original import open_described
    from pipelines.verification.encode import encode_rows
    from pipelines.verification.predict import WITHOUT_METRIC, run_predictions

    folder = Path(arguments["folder"])
    report_progress("opening the original")
    original = open_described(arguments["original"])
    signature, contract, task = original.signature, original.contract, original.task
    points, dropped = usable_points(arguments["points"], signature)
    if not points and arguments["points_given"]:
        raise no_usable_point(dropped, signature)
    data = open_data(arguments["data"], task.name, signature, contract)
    encoder = original.encoder
    samples = parity_samples(task.name, encoder, data, int(arguments["samples"]), int(arguments["seed"]))
    cases = parity_cases(original, samples, points, int(arguments["seed"]), encoder)
    report_progress(f"running the original on {len(cases)} parity cases")
    _run_cases(original, cases, folder, arguments["precisions"])
    for label in points:
        _write_point(folder, label, samples, signature, contract)
    report_progress(f"predicting {len(data)} rows with the original")
    batches = encode_rows(task.name, encoder, data, batch_size=BATCH_SIZE, seed=int(arguments["seed"]))
    predictions = run_predictions(task.name, batches, original.run)
    labels = open_labels(arguments["original"])
    if (
        "label" in data.roles and open_problem(arguments["original"]) not in WITHOUT_METRIC
    ):  # only now the classes of a model are known that names none
        refuse_unknown_labels(data, labels, len(predictions[0]))
    files.write_predictions(folder / files.PREDICTIONS, predictions)
    write_golden_rows(original, encoder, list(data), predictions, folder / files.GOLDEN, int(arguments["seed"]))
    module = original.module
    return {
        "signature": signature.to_dict(),
        "contract": contract.to_dict(),
        "points": points,
        "dropped_points": dropped,
        "data": {"origin": data.origin, "digest": data.digest, "rows": len(data), "labelled": data.labelled},
        "labels": {str(key): value for key, value in labels.items()},
        "parameters": sum(p.numel() for p in module.parameters()) if module is not None else None,
        "cases": len(cases),
    }


def usable_points(labels: Sequence[str], signature: Signature) -> tuple[list[str], list[str]]:
    """The operating points that a model takes, and a sentence for each that it does not.

    A model without a length (`Signature.length`) takes the batch sizes alone.
    """
    axes = {axis.name: axis for axis in signature.axes}
    along = signature.length
    kept: list[str] = []
    dropped: list[str] = []
    for label in labels:
        batch, length = parse_point(label)
        name = f"{batch}" if along is None else f"{batch}x{length}"
        if along is not None and length is None:
            dropped.append(f"{label}: this model needs a length too (of its axis {along.name!r})")
        elif "batch" in axes and batch > axes["batch"].max:
            dropped.append(f"{label}: the model takes batches of {axes['batch'].max} at most")
        elif along is not None and length is not None and not along.min <= length <= along.max:
            dropped.append(f"{label}: the model takes lengths from {along.min} to {along.max}")
        elif name not in kept:
            kept.append(name)
    return kept, dropped


def no_usable_point(dropped: Sequence[str], signature: Signature) -> RequestError:
    """The error for operating points of which a model takes none; its remedy names one that it takes."""
    along = signature.length
    point = "1" if along is None else f"1x{min(max(DEFAULT_LENGTH, along.min), along.max)}"
    return RequestError(
        "the model takes none of the operating points",
        "; ".join(dropped),
        f"Give points that it takes, such as {point}",
    )


def parity_samples(task: str, encoder: Any, data: Dataset, count: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Rows for parity, each a batch of one without padding, spread over the lengths of the data."""
    from calibration.sampling import stratified_subset, text_length
    from pipelines.verification.encode import encode_rows

    rows = list(data)
    lengths = [text_length(row) for row in rows]
    chosen = [rows[i] for i in stratified_subset(lengths, min(count, len(rows)), seed=seed)]
    return [batch.inputs for batch in encode_rows(task, encoder, chosen, batch_size=1, seed=seed)][:count]


def parity_cases(
    original: Original, samples: list[dict[str, np.ndarray]], points: Sequence[str], seed: int, encoder: Any
) -> list[Case]:
    from pipelines.verification.envelope import build_cases

    pad = {"input_ids": encoder.pad_id} if getattr(encoder, "pad_id", None) is not None else {}
    shapes = [parse_point(label) for label in points]
    return build_cases(samples, original.signature, original.contract, shapes, pad=pad, seed=seed)


def _run_cases(original: Original, cases: Sequence[Case], folder: Path, precisions: Sequence[str]) -> None:
    from pipelines.verification.envelope import counting_positions
    from pipelines.verification.noise_floor import fp32_floor, half_floor
    from pipelines.verification.parity import Magnitudes

    entries = []
    cheap: dict[str, dict[str, np.ndarray]] = {}
    small: list[Case] = []
    magnitudes = Magnitudes()
    for number, case in enumerate(cases):
        outputs = original.run(case.inputs)
        magnitudes.add(outputs, counting_positions(case, original.contract))
        entries.append((case, files.write_case(folder / "cases", number, case, outputs)))
        if max(array.size for array in case.inputs.values()) <= FLOOR_ELEMENTS or not small:
            small.append(case)
            cheap[case.name] = outputs
    files.write_cases(folder / "cases", entries)
    floors = {}
    report_progress("measuring the noise floor: the original in FP64")
    usual = magnitudes.usual()
    floors["fp32"] = fp32_floor(original.module, small, cheap.__getitem__, original.contract, usual)
    for precision in precisions:
        if precision in ("fp16", "bf16"):
            report_progress(f"measuring the noise floor: the original in {precision}")
            floors[precision] = half_floor(
                original.module, small, cheap.__getitem__, original.contract, precision, usual
            )
    files.write_floors(folder, floors)


def point_inputs(
    label: str, samples: Sequence[dict[str, np.ndarray]], signature: Signature, contract: InputContract
) -> dict[str, np.ndarray]:
    """Inputs of exactly an operating point's shape, real samples end to end, all attended to."""
    batch, length = parse_point(label)
    wanted = {"batch": batch, signature.length.name if signature.length else "": length}
    axes = {axis.name: axis for axis in signature.axes}
    inputs: dict[str, np.ndarray] = {}
    for spec in signature.inputs:
        pool = [sample[spec.name] for sample in samples]
        shape = tuple(
            (wanted.get(dim) or min(axes[dim].max, pool[0].shape[i])) if isinstance(dim, str) else dim
            for i, dim in enumerate(spec.shape)
        )
        if spec.name == contract.mask:
            inputs[spec.name] = np.ones(shape, dtype=spec.dtype)
            continue
        stream = np.concatenate([array.ravel() for array in pool])
        inputs[spec.name] = np.resize(stream, shape).astype(spec.dtype)
    return inputs


def _write_point(
    folder: Path,
    label: str,
    samples: Sequence[dict[str, np.ndarray]],
    signature: Signature,
    contract: InputContract,
) -> None:
    from safetensors.numpy import save_file

    (folder / "points").mkdir(exist_ok=True)
    inputs = point_inputs(label, samples, signature, contract)
    save_file({name: np.ascontiguousarray(a) for name, a in inputs.items()}, folder / "points" / f"{label}.safetensors")


def write_golden_rows(
    original: Original, encoder: Any, rows: Sequence[Any], predictions: Sequence[Any], folder: Path, seed: int
) -> None:
    """Write the rows that go into the bundle, spread over the data, with the original's predictions on them.

    Texts go in as rows, with their labels, so that the metric can be computed again; pictures and tensors as inputs,
    with the labels alone beside them.
    """
    from calibration.roles import TRUTH
    from pipelines.verification.encode import encode_rows
    from pipelines.verification.predict import run_predictions

    task = original.task.name
    text = original.modality == "text"
    most = files.GOLDEN_ROWS if text else files.GOLDEN_TENSORS
    chosen = [rows[i] for i in sorted({round(i) for i in np.linspace(0, len(rows) - 1, min(most, len(rows)))})]
    batches = encode_rows(task, encoder, chosen, batch_size=BATCH_SIZE, seed=seed)
    if len(chosen) < len(rows):
        predictions = run_predictions(task, batches, original.run)
    files.write_predictions(folder / files.PREDICTIONS, predictions)
    if text:
        files.write_rows(folder, chosen)
    else:
        files.write_batches(folder, [batch.inputs for batch in batches], [batch.indices for batch in batches])
        truths = [{role: row[role] for role in row if role in TRUTH} for row in chosen]
        if all(truths):
            files.write_rows(folder, truths)
