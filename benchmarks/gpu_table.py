"""The results of `gpu_check.py` for people: a Markdown page of a model's variants and baselines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def table(found: Mapping[str, Any]) -> str:
    """The results for people, as Markdown."""
    environment = found["environment"]
    gpu = environment["machine"]["gpu"]
    device = gpu["devices"][0] if gpu["devices"] else {}
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    lines = [
        f"# {device.get('name', 'GPU')}, {found['date']}",
        "",
        f"Compute capability {device.get('compute_capability')}, driver {gpu['driver']}, Python "
        f"{environment['machine']['python']}, {packages}; processor {environment['machine']['cpu']['model']}. "
        f"{_took(found['stages_s'])} All that ran is {'right' if found['ok'] else '**not right**'}.",
        "",
        "Times are medians of `binding.run()`, inputs and outputs on the GPU, the host waiting for each run; in "
        "brackets the 95 % interval of the ratio to the fastest PyTorch baseline at that point. *queued* is a run "
        "among others that the host does not wait for, by the GPU's own events where the runtime shows its stream; "
        "energy is the GPU's alone. Parity is the largest RMS error against FP64, in multiples of PyTorch's own error "
        "in that precision on this GPU.",
        *(f"\n{note}" for note in found.get("notes", [])),
    ]
    for name, model in found["models"].items():
        lines += ["", f"## {name} ({model.get('weights', 'not made')} weights)", ""]
        if model["error"]:
            lines += [f"Failed: {model['error']}"]
            continue
        lines += _figures(model)
        own = "; ".join(
            f"{precision} {max(errors.values()):.2g}" for precision, errors in model["pytorch_errors"].items()
        )
        lines += ["", f"PyTorch's own RMS errors: {own}.", ""]
        for what in ("skipped", "failed"):
            lines += [f"- {what}: {variant}: {reason}" for variant, reason in model[what].items()]
        broken = {variant: record["error"] for variant, record in model["parity"].items() if "error" in record}
        lines += [f"- did not run: {variant}: {reason}" for variant, reason in broken.items()]
        lines += [f"- {note}" for note in model["latency"].get("notes", [])]
        lines += together(model.get("together", {}))
    return "\n".join(lines) + "\n"


def together(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What several threads at once gave, of each variant and pair of variants."""
    lines = []
    for variant, record in records.items():
        if "error" in record:
            lines.append(f"- from several threads: {variant}: {record['error']}")
        elif record["verdict"] != "passed":
            lines.append(f"- from several threads: {variant}: differs by {record['rms']:.2g} from a run alone")
    if records and not lines:
        first, came = next(iter(records.values())), sum(record["came_and_went"] for record in records.values())
        lines.append(
            f"- from several threads: {first['threads']} threads, two sessions in a process, shapes changing, "
            f"{first['runs']} runs of each of {', '.join(records)}, captured in the middle of them, while {came} other "
            "sessions were opened and closed: the outputs are those of a run alone"
        )
    return lines


def _took(stages_s: Mapping[str, float]) -> str:
    if "done" not in stages_s:
        return "`make gpu-check` did not come to its end."
    return f"Everything took {stages_s['done']:.0f} s (`make gpu-check`)."


def _figures(model: Mapping[str, Any]) -> list[str]:
    latency = model["latency"]
    if "error" in latency:
        return [f"Not timed: {latency['error']}"]
    heads = [f"{point} µs | over PyTorch | queued µs | runs/s | mJ/run" for point in latency["points"]]
    head = f"| | {' | '.join(heads)} | parity | opens in s | GPU MB |"
    lines = [head, "| --- |" + " ---: |" * (head.count("|") - 2)]
    workers = {**latency["baselines"], **latency["variants"]}
    for name, worker in workers.items():
        cells = []
        for point in latency["points"]:
            timing, seen = worker["points"].get(point), worker["device"].get("points", {}).get(point, {})
            if timing is None:
                cells += [f"failed: {worker['error']}", "", "", "", ""]
                continue
            ratio, low, high = (timing[f"speedup_vs_best_pytorch{end}"] for end in ("", "_low", "_high"))
            cells += [
                f"{1e3 * timing['p50_ms']:.0f}",
                "" if ratio is None else f"{ratio:.2f} [{low:.2f}, {high:.2f}]",
                _number(seen.get("run_ms"), 1e3, 0),
                _number(seen.get("runs_per_s"), 1, 0),
                _number(seen.get("energy_j"), 1e3, 1),
            ]
        record = model["parity"].get(name, {})
        error = f"{max(record['times_pytorch'].values()):.2f}" if record.get("times_pytorch") else ""
        memory = worker["device"].get("memory_bytes")
        cells += [error, _number(record.get("open_s"), 1, 2), _number(memory, 1e-6, 0)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    clocks = [seen for worker in workers.values() for seen in worker["device"].get("points", {}).values()]
    if clocks and all(seen["sm_mhz"] is not None and seen["temperature_c"] is not None for seen in clocks):
        mhz, warm = [seen["sm_mhz"] for seen in clocks], [seen["temperature_c"] for seen in clocks]
        lines += ["", f"Clock of the multiprocessors {min(mhz)} to {max(mhz)} MHz, {min(warm)} to {max(warm)} °C."]
    return lines


def _number(value: float | None, scale: float, digits: int) -> str:
    return "" if value is None else f"{scale * value:.{digits}f}"
