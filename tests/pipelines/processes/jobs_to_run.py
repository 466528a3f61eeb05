"""Functions that the tests of this folder run as jobs."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import EnvironmentLackError, GateError, InternalError, RequestError
from pipelines.processes import report_progress, run_job


class UnlikeError(RequestError):
    """A subclass that the parent must see as itself."""


def echo(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"arguments": arguments, "pid": os.getpid(), "parent": os.getppid(), "group": os.getpgrp()}


def noise(arguments: dict[str, Any]) -> str:
    print("said on stdout", flush=True)
    os.write(2, b"native noise\n")
    warnings.warn("a warning", stacklevel=1)
    logging.getLogger("somewhere").info("a log record")
    report_progress("half way")
    return "done"


def numbers(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"scalar": np.float32(1.5), "path": Path("a/b"), "nan": float("nan")}


def not_json(arguments: dict[str, Any]) -> object:
    return {"bad": object()}


def environment(arguments: dict[str, Any]) -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in arguments["names"]}


def allocate(arguments: dict[str, Any]) -> int:
    return int(np.ones(arguments["bytes"], np.uint8)[-1])


def fail(arguments: dict[str, Any]) -> None:
    match arguments["how"]:
        case "request":
            raise RequestError("the key is unknown", "epohcs", "Did you mean epochs?")
        case "gate":
            raise GateError("no")
        case "lack":
            raise EnvironmentLackError("no compiler", None, "apt install g++")
        case "subclass":
            raise UnlikeError("what", 3, "remedy")
        case "value":
            raise ValueError("first line\nsecond line")
        case "disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/file")
        case "disk-wrapped":
            try:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/file")
            except OSError as error:
                raise InternalError("could not write") from error
        case "disk-text":
            raise RuntimeError("I/O error: No space left on device (os error 28)")
        case "memory":
            raise MemoryError
        case "segfault":
            ctypes.string_at(0)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "abort":
            os.abort()
        case "exit":
            os._exit(7)
        case "sys-exit":
            sys.exit(5)


def sleep(arguments: dict[str, Any]) -> None:
    report_progress("sleeping")
    time.sleep(arguments.get("seconds", 600))


def family(arguments: dict[str, Any]) -> None:
    """Start children: one in this group, one in a session of its own, one job of our own; tell their ids; wait.

    Leaves a temporary folder, as a library does whose process is killed.
    """
    tempfile.mkdtemp(prefix="unpacked-")
    same = subprocess.Popen(["sleep", "600"])
    other = subprocess.Popen(["sleep", "600"], start_new_session=True)
    report_progress(f"{os.getpid()} {same.pid} {other.pid}")
    if arguments.get("leave"):
        return
    if arguments.get("nested"):
        run_job("tests.pipelines.processes.jobs_to_run:family", {}, log=Path(arguments["log"]), on_line=report_progress)
    time.sleep(600)


def save_tensor(arguments: dict[str, Any]) -> None:
    """Write more than a small disk holds, by native code."""
    import torch

    torch.save(torch.zeros(1 << 20), Path(arguments["folder"]) / "tensor.pt")


def spin(arguments: dict[str, Any]) -> None:
    report_progress("spinning")
    while True:
        pass
