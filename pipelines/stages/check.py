"""Stage: one variant against the original: parity over the recorded cases, quality over the evaluation data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifact import InputContract, Signature
from pipelines.opening import open_variant
from pipelines.processes import report_progress
from pipelines.stages import files
from pipelines.stages.data import BATCH_SIZE, open_data, open_encoder, open_labels, open_problem
from pipelines.verification.envelope import Case

if TYPE_CHECKING:
    import numpy as np

    from exporter.targets.base import Session

QUANTIZED = ("int8", "int4", "fp8")
"""The precisions of which a session may find that none of it runs."""


def check(arguments: dict[str, Any]) -> dict[str, Any]:
    """Open a variant and judge it.

    Args:
        arguments: ``opening`` (see `pipelines.opening`), ``threads``, ``precision`` (whose rule and floor apply),
            ``recorded`` (folder of the record stage), ``parity`` and ``quality`` (what to judge), ``original``,
            ``data``, ``settings`` (of quality), ``seed``, ``folder``.

    Returns:
        ``executed``, ``parity`` and, where asked for, ``quality``: the records of the gates.
    """
    from exporter.tasks import get_task

    recorded, folder = Path(arguments["recorded"]), Path(arguments["folder"])
    report_progress("opening")
    session = open_variant(arguments["opening"], threads=int(arguments["threads"]))
    task = get_task(arguments["original"]["task"])
    report_progress("parity")
    result: dict[str, Any] = {
        "executed": session.executed(),
        "parity": check_parity(session, recorded / "cases", recorded, arguments["precision"], task.logits),
    }
    if arguments["quality"]:
        result["parity"] = as_asked(result["parity"], result["executed"], arguments["precision"])
        report_progress("quality")
        artifact = session.artifact
        result["quality"] = check_quality(session, recorded, folder, arguments, artifact.signature, artifact.contract)
    session.close()
    return result


def as_asked(parity: dict[str, Any], executed: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """The parity gate's record, failed where what ran is wider than what was asked for.

    Of the floating-point precisions each session sees for itself that no other runs. A session that emulates says so.
    """
    if precision not in QUANTIZED or precision in (executed["precision"], executed.get("emulates")):
        return parity
    told = f"it was asked for in {precision}, and its runtime computes in {executed['precision']}: no product is fused"
    return {**parity, "verdict": "failed", "reason": told}


def check_parity(session: Session, cases: Path, floors: Path, precision: str, logits: Sequence[str]) -> dict[str, Any]:
    """The parity gate's record.

    Args:
        session: The variant.
        cases: Folder of the recorded cases.
        floors: Folder of the recorded noise floors.
        precision: Whose rule and floor apply.
        logits: Outputs for which top-1 agreement means something.
    """
    from pipelines.verification.envelope import counting_positions
    from pipelines.verification.judgement import compare_alone, judge
    from pipelines.verification.parity import compare

    contract, signature = session.artifact.contract, session.artifact.signature
    errors, shapes = {}, {}
    pairs: list[Case] = []
    kept: dict[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = {}
    partners = files.read_partners(cases)
    for case, expected in files.read_cases(cases):
        binding = session.bind(case.inputs)  # not `run`: what is made for one shape is to be checked
        binding.run()
        actual = binding.host_outputs()
        errors[case.name] = compare(
            expected, actual, logits=frozenset(logits), valid=counting_positions(case, contract)
        )
        shapes[case.name] = case.shape(signature)
        if case.partner is not None:
            pairs.append(case)
        if case.partner is not None or case.name in partners:
            kept[case.name] = (expected, actual)
    original = {name: sides[0] for name, sides in kept.items()}
    variant = {name: sides[1] for name, sides in kept.items()}
    floor = files.read_floors(floors).get(precision)
    usual = {} if floor is None else floor.magnitudes
    consistency = [
        entry for case in pairs if case.partner in kept for entry in compare_alone(case, original, variant, usual)
    ]
    return judge(precision, errors, floor, shapes=shapes, consistency=consistency)


def check_quality(
    session: Session,
    recorded: Path,
    folder: Path,
    arguments: Mapping[str, Any],
    signature: Signature,
    contract: InputContract,
) -> dict[str, Any]:
    """The quality gate's record: the task metric where there are labels, agreement with the original elsewhere.

    Leaves the variant's predictions under `folder`.
    """
    from pipelines.verification.encode import encode_rows
    from pipelines.verification.judgement import RULES
    from pipelines.verification.predict import run_predictions

    original, settings = arguments["original"], arguments["settings"]
    task = original["task"]
    data = open_data(arguments["data"], task, signature, contract)
    rows = list(data)
    encoder = open_encoder(original, signature)
    batches = encode_rows(task, encoder, rows, batch_size=BATCH_SIZE, seed=int(arguments["seed"]))
    mine = run_predictions(task, batches, session.run)
    theirs = files.read_predictions(recorded / files.PREDICTIONS)
    files.write_predictions(folder / files.PREDICTIONS, mine)
    labels = open_labels(original)
    return judge_predictions(
        task,
        theirs,
        mine,
        rows,
        batches,
        data.labelled,
        labels,
        settings,
        int(arguments["seed"]),
        problem=open_problem(original),
        # Where parity judges, it shows that both compute the same but for rounding: few rows tell no less than many.
        exact=RULES[arguments["precision"]].multiple is None,
    )


def judge_predictions(
    task: str,
    theirs: Sequence[Any],
    mine: Sequence[Any],
    rows: Sequence[Any],
    batches: Sequence[Any],
    labelled: bool,
    labels: Mapping[int, str],
    settings: Mapping[str, Any],
    seed: int,
    *,
    problem: str = "",
    exact: bool = False,
    again: bool = False,
) -> dict[str, Any]:
    """Judge a variant's predictions against the original's on the same rows (see `check_quality`).

    Args:
        task: Name of the task.
        theirs: The original's predictions.
        mine: The variant's.
        rows: The data.
        batches: The same, encoded.
        labelled: `rows` carry labels.
        labels: The model's class names.
        settings: Of quality, as the recipe has them.
        seed: Of the bootstrap.
        problem: The ``problem_type`` of the model's configuration.
        exact: See `paired_bootstrap`.
        again: The rows are a bundle's sample (`pipelines.verification.again`).
    """
    from exporter.tasks import get_task
    from pipelines.verification.again import judge_agreement_again, judge_quality_again
    from pipelines.verification.agreement import agreement, judge_agreement
    from pipelines.verification.metrics import get_metric
    from pipelines.verification.predict import WITHOUT_METRIC, metric_arguments
    from pipelines.verification.quality import judge_quality, paired_bootstrap

    name = settings["metric"] or get_task(task).metric
    if again and (not labelled or name is None or problem in WITHOUT_METRIC):
        return judge_agreement_again(task, theirs, mine, len(rows), problem=problem, seed=seed)
    measures = agreement(task, theirs, mine, problem=problem)
    if labelled and problem in WITHOUT_METRIC:
        return judge_agreement(measures, len(rows), f"(their labels are not used: no metric takes {problem})")
    if not labelled or name is None:
        return judge_agreement(measures, len(rows))
    mine_scored, truths = metric_arguments(task, mine, rows, batches=batches, labels=labels)
    theirs_scored, _ = metric_arguments(task, theirs, rows, batches=batches, labels=labels)
    found = paired_bootstrap(
        get_metric(name),
        theirs_scored,
        mine_scored,
        truths,
        resamples=int(settings["bootstrap"]),
        seed=seed,
        exact=exact,
    )
    judge = judge_quality_again if again else judge_quality
    verdict = judge(found, settings["max_drop"], settings["max_drop_worst"])
    told = [{"name": m.name, "value": m.value, "threshold": None, "verdict": "informs"} for m in measures]
    return {**verdict, "measures": told}
