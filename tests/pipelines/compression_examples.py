"""Report documents of runs that compressed. The figures are made up and mean nothing about any machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tests.pipelines.report_examples import HOSTILE, POINTS, full, labelled_quality, parity, variant

TEACHER = "1-finetune"
TEACHER_BYTES = 437_960_000
RUNNERS = {"eager": 1.0, "onnxruntime-cpu-fp32": 1.6, "openvino-cpu-fp32": 1.4}
INT8 = "onnxruntime-cpu-int8-dynamic"


def beside(difference: float, half: float = 0.85, verdict: str = "passed") -> dict[str, Any]:
    """A model's quality beside the teacher's."""
    return {
        "verdict": verdict,
        "reason": f"{difference:+.2f} points on 1821 rows, 2 may be lost, 4 at worst",
        "metric": "macro-f1",
        "original": 0.9142,
        "original_low": 0.9,
        "original_high": 0.93,
        "variant": 0.9142 + difference / 100,
        "difference": difference,
        "low": difference - half if difference else -0.1,
        "high": difference + half if difference else 0.1,
        "agreement": {"name": "label agreement", "value": 0.97, "threshold": None, "verdict": "informs"},
    }


def times(speedup: float, spread: float = 0.03) -> dict[str, dict[str, float]]:
    """Speed-ups at the four points; what is faster at one text is less so at many."""
    found = {}
    for i, name in enumerate(POINTS):
        value = speedup ** (1 - 0.1 * i)
        ends = {"speedup_low": value * (1 - spread), "speedup_high": value * (1 + spread)}
        found[name] = {"p50_ms": 48.0 / value, "speedup": value, **ends}
    return found


def hop(
    name: str, title: str, difference: float, share: float, flops: float, speedup: float, structure: Sequence[int]
) -> dict[str, Any]:
    layers, heads, neurons = structure
    parameters = round(109_483_778 * share)
    return {
        "name": name,
        "title": title,
        "kind": name.partition("-")[2],
        "digest": "sha256:" + "4f" * 32,
        "seconds": 3120.5,
        "size": {
            "bytes": round(TEACHER_BYTES * share),
            "parameters": parameters,
            "non_zero": parameters - 100,
            "embedding_parameters": 23_440_896,
            "flops_per_token": flops,
            "layers": layers,
            "layer_structure": {"heads": [heads] * layers, "neurons": [neurons] * layers, "shares": [*range(layers)]},
        },
        "quality": beside(difference),
        "speed": {
            runner: {"times_teacher_eager": times(speedup * gain), "times_teacher": times(speedup)}
            for runner, gain in RUNNERS.items()
        },
    }


def training(steps: int, score: float, teacher: str | None = None) -> dict[str, Any]:
    losses = [
        {"step": s, "loss": 0.12 + 0.9 * math.exp(-4 * s / steps)} for s in range(20, steps, max(20, steps // 60))
    ]
    evaluations = [
        {"step": steps * i // 6, "epoch": i / 2, "loss": 0.2 + 0.6 / i, "score": score - 0.2 / i**2}
        for i in range(1, 7)
    ]
    return {
        "steps": steps,
        "epochs": 3.0,
        "seconds": 2950.0,
        "losses": losses,
        "evaluations": evaluations,
        "resumed_at": 0,
        "examples": 67_349,
        "devices": 1,
        "precision": "bf16",
        "loss": {"hard": 0.5, "soft": 0.5, "temperature": 2.0} if teacher else {"hard": 1.0, "temperature": 2.0},
        "teacher": teacher,
    }


def steps() -> list[dict[str, Any]]:
    settings = {"epochs": 3.0, "batch_size": 32, "learning_rate": 2e-5, "schedule": "linear", "max_length": None}
    matrices = {
        f"bert.encoder.layer.{i}.{part}.weight": 0.5 + 0.03 * i
        for i in range(6)
        for part in ("attention.self.query", "intermediate.dense", "output.dense")
    }
    return [
        {"name": TEACHER, "kind": "finetune", "asked": settings, "training": training(6315, 0.915)},
        {
            "name": "2-prune",
            "kind": "prune",
            "asked": {"vocabulary": True, "min_count": 1, "recover": None},
            "removed": {
                "tokens_before": 30_522,
                "tokens_after": 12_840,
                "parameters_removed": 13_579_776,
                "tokens_per_text_before": 24.1,
                "tokens_per_text": 24.3,
                "unknown_share": 0.0,
            },
            "training": None,
        },
        {
            "name": "3-distil",
            "kind": "distil",
            "asked": settings,
            "student": {"layers": [0, 2, 4, 7, 9, 11], "made": "layers 0, 2, 4, 7, 9, 11 of 12"},
            "training": training(6315, 0.908, TEACHER),
        },
        {
            "name": "4-prune",
            "kind": "prune",
            "asked": {"heads": 0.3, "neurons": 0.4, "recover": settings},
            "removed": {
                "before": {"heads": [12] * 6, "neurons": [3072] * 6},
                "after": {"heads": [5, 8, 9, 10, 9, 9], "neurons": [1024, 1520, 1856, 2208, 2304, 2144]},
                "rows": 512,
            },
            "training": training(2105, 0.906, TEACHER),
        },
        {
            "name": "5-prune",
            "kind": "prune",
            "asked": {"sparsity": 0.6, "scope": "global", "gradual": 8, "recover": settings},
            "removed": {"sparsity": 0.6, "pattern": None, "by_matrix": matrices},
            "training": training(2105, 0.905, TEACHER),
        },
    ]


def compressed() -> dict[str, Any]:
    """Five hops: fine-tuned, vocabulary cut, distilled, heads and neurons removed, weights at zero; INT8 selected."""
    report = full()
    int8 = variant(INT8, "onnxruntime-cpu", "int8", (3.9, 3.5, 2.9, 2.6), form="dynamic", bytes=35_300_000)
    int8["gates"]["parity"] = parity(4.1e-2, 1.0e-3, None)
    int8["gates"]["quality"] = labelled_quality(-0.12, 0.2)
    for entry in report["variants"]:
        entry["bytes"] = 139_700_000 if entry["precision"] == "fp32" and entry["bytes"] else entry["bytes"]
    report["variants"].append(int8)
    selected = dict.fromkeys(("overall", *POINTS[:2]), INT8) | dict.fromkeys(POINTS[2:], "onnxruntime-cpu-fp32")
    hops = [
        hop(TEACHER, "fine-tuned", 0.0, 1.0, 170e6, 1.0, (12, 12, 3072)),
        hop("2-prune", "12840 of 30522 tokens kept", -0.05, 0.876, 170e6, 1.01, (12, 12, 3072)),
        hop("3-distil", "distilled into 6 layers", -0.42, 0.487, 85e6, 1.98, (6, 12, 3072)),
        hop("4-prune", "removed 22 of 72 heads, 7392 of 18432 neurons", -0.71, 0.319, 52e6, 3.1, (6, 8, 1843)),
        hop("5-prune", "60% of the weights zero", -0.68, 0.319, 52e6, 3.1, (6, 8, 1843)),
    ]
    hops[4]["size"]["non_zero"] = round(hops[4]["size"]["parameters"] * 0.62)
    report["compression"] = {
        "teacher": TEACHER,
        "labelled": True,
        "rows": 1821,
        "hops": hops,
        "selected": {
            "onnxruntime-cpu-fp32": {
                "bytes": 139_700_000,
                "quality": beside(-0.68),
                "times_teacher_eager": times(5.1),
            },
            INT8: {"bytes": 35_300_000, "quality": beside(-0.8, 0.9), "times_teacher_eager": times(12.3)},
        },
        "gate": {
            "verdict": "passed",
            "reason": "-0.68 points (-1.53 to +0.17) on 1821 rows, 2 may be lost, 4 at worst",
            "difference": -0.68,
            "low": -1.53,
            "high": 0.17,
            "max_drop": 2.0,
            "max_drop_worst": 4.0,
        },
        "notes": [],
        "busy_elsewhere": 0.02,
        "steps": steps(),
    }
    report["verdict"] = {"ok": True, "selected": selected, "sentence": None}
    return report


def lost_too_much() -> dict[str, Any]:
    """Compression lost more than its budget; conversion is as true as ever."""
    report = compressed()
    bad = beside(-3.1, 1.1, "failed")
    report["compression"]["hops"][-1]["quality"] = bad
    for entry in report["compression"]["selected"].values():
        entry["quality"] = beside(-3.3, 1.1, "failed")
    report["compression"]["gate"] |= {"verdict": "failed", "difference": -3.1, "low": -4.2, "high": -2.0}
    return report


def without_labels() -> dict[str, Any]:
    """No labels: agreement with the teacher, and the loss is not known."""
    report = compressed()
    compression = report["compression"]
    compression["labelled"] = False
    models = [*compression["hops"], *compression["selected"].values()]
    for i, entry in enumerate(models):
        measure = {"name": "label agreement", "value": 1 - 0.01 * i, "threshold": 0.98, "verdict": "passed"}
        entry["quality"] = {"verdict": "failed", "reason": "", "metric": "agreement", "agreement": measure}
    reason = "the evaluation data have no labels that the task's metric takes"
    compression["gate"] = {"verdict": "skipped", "reason": reason}
    return report


def untimed() -> dict[str, Any]:
    """The teacher takes other inputs, so nothing was timed against it; one step, one model before it."""
    report = compressed()
    compression = report["compression"]
    compression["hops"].insert(0, compression["hops"][0] | {"name": "source", "title": "the source", "kind": "source"})
    for entry in compression["hops"]:
        entry["speed"] = {}
    for entry in compression["selected"].values():
        entry["times_teacher_eager"] = {}
    compression["notes"] = ["1-finetune takes other inputs, so nothing was timed against it."]
    return report


def hostile() -> dict[str, Any]:
    """Markup in every text of the compression."""

    def spoiled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spoiled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [spoiled(item) for item in value]
        return HOSTILE if isinstance(value, str) else value

    report = compressed()
    report["compression"] = spoiled(report["compression"])
    report["compression"]["selected"][HOSTILE] = report["compression"]["selected"][INT8]
    report["compression"]["steps"][4]["removed"]["by_matrix"][HOSTILE] = 0.5
    report["compression"]["steps"][4]["asked"][HOSTILE] = HOSTILE
    return report


def nothing_known() -> dict[str, Any]:
    """Every leaf of the compression null."""

    def blank(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: blank(item) for key, item in value.items()}
        return [blank(item) for item in value] if isinstance(value, list) else None

    report = compressed()
    report["compression"] = blank(report["compression"])
    return report


EXAMPLES = {
    function.__name__: function
    for function in (compressed, lost_too_much, without_labels, untimed, hostile, nothing_known)
}
