"""What this machine is: processor, memory, GPU, system. Standard library only, and nothing here changes anything."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

# Instruction sets that compiled code can use; everything else in the flags (power management, mitigations) may
# change with a kernel update and says nothing about whether an engine runs.
_INSTRUCTION_SETS = re.compile(
    r"(sse|ssse|avx|amx_|fma|f16c|bmi|popcnt|abm|movbe|adx|aes|vaes|pclmul|vpclmul|sha|gfni|asimd|neon|sve|sme(?!p)|bf16|i8mm|fphp)"
)
_SMI_SECONDS = 10


def probe() -> dict[str, Any]:
    """Describe this machine, as it goes into reports.

    Returns:
        ``cpu`` (``model``, ``architecture``, ``cores``, ``threads``, ``affinity``: ids of the processors this process
        may use, ``quota``: processors' worth of time a container allows or null, ``features``), ``memory_bytes``,
        ``memory_limit_bytes`` (of the container, or null), ``gpu`` (``available``, ``reason``, ``driver``,
        ``devices``), ``os``, ``python``.
    """
    return {
        "cpu": {
            "model": cpu_model(),
            "architecture": platform.machine(),
            "cores": _physical_cores(),
            "threads": os.cpu_count() or 1,
            "affinity": affinity(),
            "quota": cpu_quota(),
            "features": cpu_features(),
        },
        "memory_bytes": memory_bytes(),
        "memory_limit_bytes": _memory_limit_bytes(),
        "gpu": gpu(),
        "os": platform.platform(),
        "python": platform.python_version(),
    }


def fingerprint() -> dict[str, Any]:
    """What an engine compiled here depends on; where any of it differs the engine is not the same.

    Returns:
        ``architecture``, ``cpu_features`` (sorted), ``torch`` (version, empty when it is not installed) and
        ``compiler`` (first line of ``g++ --version``, or of ``$CXX``; empty when there is none).
    """
    try:
        torch_version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch_version = ""
    return {
        "architecture": platform.machine(),
        "cpu_features": cpu_features(),
        "torch": torch_version,
        "compiler": compiler_version(),
    }


def circumstances() -> dict[str, Any]:
    """What durations measured here depend on beside `fingerprint`: with any of it they would be others.

    Returns:
        ``cpu`` (model), ``affinity``, ``quota``, ``memory_bytes`` and ``machine``: a digest of the system's own id of
        this machine (empty where it has none), which is not to be told itself.
    """
    name = _read("/etc/machine-id").strip()
    return {
        "cpu": cpu_model(),
        "affinity": affinity(),
        "quota": cpu_quota(),
        "memory_bytes": memory_bytes(),
        "machine": hashlib.sha256(f"planish {name}".encode()).hexdigest() if name else "",
    }


def affinity() -> list[int]:
    """Ids of the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cpu_model() -> str:
    """The processor's name as it gives it, or the architecture where it gives none."""
    return _cpuinfo("model name", "Hardware", "Processor") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The instruction sets of this processor, sorted, under the kernel's names (``avx2``, ``avx512_vnni`` …)."""
    flags = _cpuinfo("flags", "Features").split()
    return sorted({flag for flag in flags if _INSTRUCTION_SETS.match(flag)})


def compiler_version() -> str:
    """First line of the C++ compiler's ``--version``; empty when there is none."""
    command = shutil.which(os.environ.get("CXX") or "g++")
    return _first_line([command, "--version"]) if command else ""


def memory_bytes() -> int:
    """Physical memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gpu() -> dict[str, Any]:
    """Look for NVIDIA GPUs without creating a CUDA context.

    Returns:
        ``available``, ``reason`` (why not; empty when available), ``driver`` (version or null) and ``devices``: a
        list of ``name``, ``memory_bytes``, ``compute_capability``.
    """
    found = _gpu_by_nvml()
    if found is None:
        found = _gpu_by_smi()
    if found is not None:
        driver, devices = found
        reason = "" if devices else "the NVIDIA driver reports no device"
        return {"available": bool(devices), "reason": reason, "driver": driver, "devices": devices}
    if _load("libcuda.so.1") is not None:
        reason = "libcuda.so.1 is here, but neither NVML nor nvidia-smi reports a device"
    else:
        reason = "no NVIDIA driver: libcuda.so.1 was not found"
    return {"available": False, "reason": reason, "driver": None, "devices": []}


class _NvmlMemory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _gpu_by_nvml() -> tuple[str | None, list[dict[str, Any]]] | None:
    nvml = _load("libnvidia-ml.so.1")
    if nvml is None or nvml.nvmlInit_v2() != 0:
        return None
    try:
        text = ctypes.create_string_buffer(96)
        driver = text.value.decode() if nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0 else None
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return driver, []
        devices = []
        for index in range(count.value):
            device = ctypes.c_void_p()
            if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
                continue
            memory, major, minor = _NvmlMemory(), ctypes.c_int(), ctypes.c_int()
            named = nvml.nvmlDeviceGetName(device, text, len(text)) == 0
            sized = nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) == 0
            known = nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)) == 0
            devices.append(
                {
                    "name": text.value.decode() if named else "unknown",
                    "memory_bytes": memory.total if sized else None,
                    "compute_capability": f"{major.value}.{minor.value}" if known else None,
                }
            )
        return driver, devices
    finally:
        nvml.nvmlShutdown()


def _gpu_by_smi() -> tuple[str | None, list[dict[str, Any]]] | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = "--query-gpu=driver_version,name,memory.total,compute_cap"
    text = _output([command, query, "--format=csv,noheader,nounits"])
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    rows = [row for row in rows if len(row) == 4 and row[2].isdigit()]
    if not rows:
        return None
    devices = [{"name": n, "memory_bytes": int(m) << 20, "compute_capability": c} for _, n, m, c in rows]
    return rows[0][0], devices


def _load(library: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(library)
    except OSError:
        return None


def _output(command: list[str]) -> str:
    """What a command prints; empty when it fails, hangs or cannot be started."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_SMI_SECONDS,
            stdin=subprocess.DEVNULL,
            check=False,
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _first_line(command: list[str]) -> str:
    return next(iter(_output(command).splitlines()), "").strip()


def _cpuinfo(*keys: str) -> str:
    """The first value of any of `keys` in ``/proc/cpuinfo``; empty where there is none."""
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _physical_cores() -> int | None:
    pairs = set()
    package = ""
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "physical id":
            package = value
        elif key == "core id":
            pairs.add((package, value))
    return len(pairs) or None


def cpu_quota() -> float | None:
    """Processors' worth of time that a container allows, or ``None`` where it sets no limit."""
    limit, _, period = _read("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    if not limit:  # control groups of the first version
        limit, period = (_read(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(limit) / int(period) if limit.isdigit() and period.isdigit() else None


def _memory_limit_bytes() -> int | None:
    text = _read("/sys/fs/cgroup/memory.max").strip()
    return int(text) if text.isdigit() else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
