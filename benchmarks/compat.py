"""Load bundles in other people's tools, each in an environment of its own, and compare with plain ONNX Runtime.

    python benchmarks/compat.py [BUNDLE …] [--tools optimum-onnx sentence-transformers transformers.js]

The environments are made under ``--environments`` (by default ``~/.cache/planish/compat``) and kept. What each tool
computes from fixed sentences, tokenization included, is compared with the same file in plain ONNX Runtime: the bundle's
``onnx/model.onnx``, and ``onnx/model_int8.onnx`` where it has one. Where the bundle has golden outputs, plain ONNX
Runtime is compared with those of the original first. The result goes to ``benchmarks/results/compat.json`` and
``.md``; exit status 1 when a tool failed or disagreed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from compat_environments import TOOLS, Tool, failure, prepare

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
BUNDLES = HERE.parent / "bundles"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "planish" / "compat"
TOLERANCE_RMS = 1e-5
"""The RMS relative difference up to which two runs of one FP32 graph agree: other versions order sums otherwise."""
SHARE = 0.1
"""Two runs of an int8 graph agree up to this share of its own difference to the FP32 graph: what differs in the last
bits may be rounded to the next integer."""
FILES = {"fp32": "onnx/model.onnx", "int8": "onnx/model_int8.onnx"}
GOLDEN = "ONNX Runtime against the original's golden outputs"
TEXTS = [
    "Hello.",
    "The ferry leaves at a quarter past seven, unless the fog comes in.",
    "Naïve café owners don't always read the small print — and who could blame them?",
    "After three weeks of rain the river had risen above the lower meadow, so the farmer moved the sheep up the hill.",
    "I would not watch this film again, not even for the music.",
    "What a wonderful, generous and funny little book!",
]
QUESTION = "What does this sentence talk about?"
Arrays = dict[str, np.ndarray]


def main() -> int:
    arguments = _parser().parse_args()
    bundles = arguments.bundles or sorted(path.parent for path in BUNDLES.glob("*/planish.json"))
    if not bundles:
        print("error: there is no bundle under bundles/; run make export first, or name one", file=sys.stderr)
        return 2
    if lacking := [str(bundle) for bundle in bundles if not (bundle / "onnx" / "model.onnx").is_file()]:
        print(f"error: no onnx/model.onnx in {', '.join(lacking)}", file=sys.stderr)
        return 2
    places = {}
    for name in arguments.tools:
        say(f"{name}: environment")
        places[name] = prepare(TOOLS[name], arguments.environments, arguments.torch, arguments.torch_index)
    rows = []
    for bundle in bundles:
        rows += examine(bundle.resolve(), places, arguments.task)
    document = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "tolerance_rms": TOLERANCE_RMS,
        "texts": len(TEXTS),
        "checks": rows,
    }
    text = render(document)
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    content = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (arguments.out / "compat.json").write_text(content, encoding="utf-8")
    (arguments.out / "compat.md").write_text(text + "\n", encoding="utf-8")
    return 1 if any(row["verdict"] == "failed" for row in rows) else 0


def examine(bundle: Path, places: dict[str, Path | str], task: str | None) -> list[dict[str, Any]]:
    """Everything about one bundle: a row for each thing that was loaded or could not be.

    Args:
        bundle: A bundle, or a model folder with ``onnx/model.onnx``.
        places: By tool, the folder of its environment, or why there is none.
        task: What the model does, where the folder has no manifest that says it.
    """
    manifest = _json(bundle / "planish.json")
    name, task = manifest.get("name", bundle.name), task or manifest.get("task", "feature-extraction")
    say(f"{name}: plain ONNX Runtime")
    asked = [refer(bundle, task, "fp32")]
    if (bundle / FILES["int8"]).is_file():
        asked.append(refer(bundle, task, "int8", asked[0].reference))
    rows = [{"bundle": name, "tool": "plain ONNX Runtime", **row} for row in golden_rows(bundle)]
    for tool_name, place in places.items():
        tool = TOOLS[tool_name]
        base = {"bundle": name, "tool": tool_name}
        reason = tool.unfit(task, bundle) if isinstance(place, Path) else ""
        if not isinstance(place, Path):
            rows.append({**base, "versions": {}, "loaded": "", "verdict": "failed", "reason": place})
        elif reason:
            rows.append({**base, "versions": {}, "loaded": "", "verdict": "skipped", "reason": reason})
        else:
            for one in asked:
                say(f"{name}: {tool_name}, {one.request['file']}")
                rows += [{**base, **row} for row in tool_rows(tool, place, bundle, one)]
    return rows


@dataclass(frozen=True)
class Asked:
    """What tools are asked to do with one file.

    Attributes:
        request: For the tool's script.
        reference: By output, what plain ONNX Runtime makes of it.
        mask: Which positions count.
        limits: By output, the RMS relative difference up to which a tool agrees.
    """

    request: dict[str, Any]
    reference: Arrays
    mask: np.ndarray
    limits: dict[str, float]


def refer(bundle: Path, task: str, dtype: str, fp32: Arrays | None = None) -> Asked:
    """What tools are asked to do with the file of one precision; `fp32` is the reference of an int8 file's FP32 one."""
    from exporter.encoders.text import TextEncoder
    from exporter.targets.onnxruntime import open_cpu_session
    from exporter.tasks import get_task

    session = open_cpu_session(bundle / FILES[dtype], threads=os.cpu_count() or 1)
    names = tuple(value.name for value in session.get_inputs())
    encoder = TextEncoder.load(bundle, inputs=names, truncation=get_task(task).truncation)
    texts, pairs = (([QUESTION] * len(TEXTS)), TEXTS) if task == "question-answering" else (TEXTS, None)
    inputs = encoder.encode(texts, pairs)
    outputs = dict(zip((value.name for value in session.get_outputs()), session.run(None, inputs), strict=True))
    pooling, normalize = pooling_of(bundle)
    request = {
        "task": task,
        "dtype": dtype,
        "file": FILES[dtype],
        "texts": texts,
        "pairs": pairs,
        "outputs": list(outputs),
        "pooling": pooling,
        "normalize": normalize,
    }
    reference = {"input_ids": inputs["input_ids"], **outputs}
    if task == "text-classification":
        shifted = np.exp(outputs["logits"] - outputs["logits"].max(axis=-1, keepdims=True))
        reference["scores"] = shifted / shifted.sum(axis=-1, keepdims=True)
    mask = inputs.get("attention_mask", np.ones_like(inputs["input_ids"]))
    limits = dict.fromkeys(reference, TOLERANCE_RMS)
    if fp32 is not None:
        own = {name: differences(fp32[name], array, mask)[1] for name, array in reference.items()}
        limits = {name: SHARE * size if np.isfinite(size) else 0.0 for name, size in own.items()}
    return Asked(request, reference, mask, limits)


def pooling_of(bundle: Path) -> tuple[str | None, bool]:
    """How a sentence-transformers folder pools, in transformers.js's words (`None` for a way that it lacks)."""
    modules = _json(bundle / "modules.json") or []
    kinds = {entry["type"].rsplit(".", 1)[-1]: entry["path"] for entry in modules}
    if "Pooling" not in kinds or set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        return None, False
    config = _json(bundle / kinds["Pooling"] / "config.json")
    ways = [way for way, key in (("mean", "mean_tokens"), ("cls", "cls_token")) if config.get(f"pooling_mode_{key}")]
    others = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    return (ways[0] if len(ways) == len(others) == 1 else None), "Normalize" in kinds


def golden_rows(bundle: Path) -> list[dict[str, Any]]:
    """Plain ONNX Runtime against the outputs of the original that the bundle carries: the worst of all cases."""
    folder = bundle / "evidence" / "golden" / "cases"
    if not folder.is_dir():
        return []
    import onnxruntime

    from exporter.targets.onnxruntime import open_cpu_session
    from pipelines.stages.files import read_cases

    session = open_cpu_session(bundle / "onnx" / "model.onnx", threads=os.cpu_count() or 1)
    names = [value.name for value in session.get_outputs()]
    worst: dict[str, tuple[float, float]] = {}
    cases = 0
    for case, expected in read_cases(folder):
        cases += 1
        found = dict(zip(names, session.run(None, case.inputs), strict=True))
        mask = case.inputs.get("attention_mask")
        for name in expected:
            size = differences(expected[name], found[name], mask)
            worst[name] = tuple(np.maximum(worst.get(name, (0.0, 0.0)), size).tolist())
    versions = {"onnxruntime": onnxruntime.__version__}
    loaded = f"InferenceSession(onnx/model.onnx), against the original on {cases} golden inputs"
    return [
        {"versions": versions, "loaded": loaded, **judge(name, *size, TOLERANCE_RMS)} for name, size in worst.items()
    ]


def tool_rows(tool: Tool, place: Path, bundle: Path, wanted: Asked) -> list[dict[str, Any]]:
    """Have a tool load the bundle and run the sentences; one row for each output that it gave."""
    request, reference = wanted.request, wanted.reference
    with tempfile.TemporaryDirectory(prefix="planish-compat-") as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        reason = tool.run(place, bundle, asked, answered)
        if reason:
            return [{"versions": {}, "loaded": "", "verdict": "failed", "reason": reason}]
        answer = json.loads(answered.read_text(encoding="utf-8"))
    rows = []
    for check in answer["checks"]:
        base = {"versions": answer["versions"], "loaded": check["loaded"], "file": check.get("file")}
        if "error" in check:
            rows.append({**base, "verdict": "failed", "reason": failure(check["error"], bundle)})
            continue
        if check["file"] != request["file"]:  # files of one name confuse some tools, by the order of the folder
            rows.append({**base, "verdict": "failed", "reason": f"it opened {check['file']}"})
            continue
        arrays = {name: np.array(a["data"]).reshape(a["shape"]) for name, a in check["arrays"].items()}
        ids = arrays.pop("input_ids", None)
        if ids is not None and not np.array_equal(ids, reference["input_ids"]):
            rows.append({**base, "output": "input_ids", "verdict": "failed", "reason": "other tokens than ours"})
        elif not arrays:
            rows.append({**base, "verdict": "failed", "reason": "it gave none of the model's outputs"})
        else:
            sizes = {n: differences(reference[n], array, wanted.mask) for n, array in arrays.items()}
            rows += [{**base, **judge(n, *size, wanted.limits[n])} for n, size in sizes.items()]
    return rows


def differences(expected: np.ndarray, found: np.ndarray, mask: np.ndarray | None) -> tuple[float, float]:
    """Largest absolute and RMS relative difference over the positions that count."""
    from pipelines.verification.parity import compare

    error = compare({"": expected}, {"": found}, valid=mask)[""]
    return (float("inf"), float("inf")) if error.nonfinite_mismatch else (error.max_abs, error.rms_relative)


def judge(output: str, max_abs: float, rms: float, limit: float) -> dict[str, Any]:
    finite = bool(np.isfinite(rms))
    agrees = finite and rms <= limit
    reason = "" if agrees else "it computes something else" if finite else "other shapes, or NaN or Inf"
    figures = {"max_abs": max_abs if finite else None, "rms_relative": rms if finite else None, "limit_rms": limit}
    return {"output": output, **figures, "verdict": "agrees" if agrees else "failed", "reason": reason}


def render(document: dict[str, Any]) -> str:
    """The document as Markdown."""
    lines = [
        "# Bundles in other people's tools",
        "",
        f"{document['date']}. {document['texts']} sentences; each tool tokenizes and runs them itself. Differences are "
        "to the same file in plain ONNX Runtime: `onnx/model.onnx`, and where that is said `onnx/model_int8.onnx`. A "
        f"tool agrees up to an RMS relative difference of {document['tolerance_rms']:g} in FP32, and in int8 of a "
        "tenth of what int8 itself makes.",
        "",
        "| bundle | tool | loaded | output | max abs | RMS relative | limit | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in document["checks"]:
        figures = [
            "–" if row.get(key) is None else f"{row[key]:.1e}" for key in ("max_abs", "rms_relative", "limit_rms")
        ]
        verdict = row["verdict"] + (f": {row['reason']}" if row.get("reason") else "")
        loaded = f"`{row['loaded']}`" if row["loaded"] else "–"
        cells = [row["bundle"], row["tool"], loaded, row.get("output") or "–", *figures, verdict.replace("|", "\\|")]
        lines.append("| " + " | ".join(cells) + " |")
    versions = {row["tool"]: row["versions"] for row in document["checks"] if row["versions"]}
    lines += ["", *(f"- {tool}: {', '.join(f'{k} {v}' for k, v in found.items())}" for tool, found in versions.items())]
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=Path, help="by default every bundle under bundles/")
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS), help="which tools")
    parser.add_argument("--task", help="what the model does, where a folder has no planish.json")
    parser.add_argument("--environments", type=Path, default=CACHE, help="where the environments are kept")
    parser.add_argument(
        "--torch", default="torch==2.13.0", help="the build of torch that Python environments get first"
    )
    parser.add_argument("--torch-index", help="package index of torch, where it is not pip's own")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
