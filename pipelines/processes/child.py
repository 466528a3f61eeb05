"""One child process: how it is started, spoken with, stopped, continued and ended."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from exporter.errors import PlanishError
from pipelines.processes import failures, tree, watcher

_POLL_SECONDS = 0.1
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def thread_environment(threads: int) -> dict[str, str]:
    """The environment variables that hold native thread pools to `threads` threads."""
    return dict.fromkeys(THREAD_VARIABLES, str(threads))


class Stopped(BaseException):
    """Nobody waits for a child's answer any more. No `Exception`: it is not to be taken for a failure of the child."""


class Child:
    """A function that runs in a process of its own, in a process group of its own, and dies with this process.

    Its stdout and stderr go to the end of the log. Its temporary files (``TMPDIR``) go to a folder that is removed with
    it: an engine is unpacked into one, and a process that is killed would leave it there. Messages are JSON documents
    over pipes. Use it as a context manager: leaving it kills whatever is left of the group. The kernel also ends the
    child when the *thread* that made it ends, so keep it within one thread.

    Args:
        function: ``"module:name"``; called with `arguments` as its only argument.
        arguments: A JSON-able dict.
        log: The file to append output to; its folder is made.
        env: Environment variables on top of this process's own.
        threads: Threads that native libraries may use, or ``None`` to leave that as it is.
        memory_limit_bytes: Private memory that the child may hold (``RLIMIT_DATA``), or ``None``.
    """

    def __init__(
        self,
        function: str,
        arguments: dict[str, Any],
        *,
        log: Path,
        env: dict[str, str] | None = None,
        threads: int | None = None,
        memory_limit_bytes: int | None = None,
    ) -> None:
        self.function = function
        self.log = log
        self.returncode: int | None = None
        self._pending = b""
        self._ended = False
        request = json.dumps(
            {
                "function": function,
                "arguments": arguments,
                "path": sys.path,
                "memory_limit_bytes": memory_limit_bytes,
                "log": str(log.resolve()),
            }
        )
        extra = {**(thread_environment(threads) if threads is not None else {}), **(env or {})}
        log.parent.mkdir(parents=True, exist_ok=True)
        tree.prepare()
        environment, self._token, self._scratch = tree.environment(extra)
        self._messages, messages_write = os.pipe()
        try:
            with log.open("ab") as output:
                output.write(f"--- {datetime.now().isoformat(timespec='seconds')} {function}\n".encode())
                output.flush()
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "pipelines.job", str(os.getpid()), str(messages_write)],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    env=environment,
                    pass_fds=(messages_write,),
                    process_group=0,
                    bufsize=0,
                )
        except BaseException:
            os.close(self._messages)
            shutil.rmtree(self._scratch, ignore_errors=True)
            raise
        finally:
            os.close(messages_write)
        self.pid = self._process.pid
        try:
            tree.register(self.pid)
            self._send_line(request)
        except BaseException:  # Ctrl-C in between
            self.kill()
            raise

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def send(self, command: dict[str, Any]) -> None:
        """Send a command to a function that reads `inside.commands`; a child that is gone is noticed by `receive`."""
        self._send_line(json.dumps(command))

    def receive(self, timeout_s: float | None = None, stop: threading.Event | None = None) -> tuple[str, Any]:
        """The child's next message: its kind (``"progress"``, ``"result"``, or what the function sent) and content.

        Raises:
            PlanishError: The function raised it, or the child ended without a result (see `failures`).
            TimeoutError: There was no message within `timeout_s` seconds.
            Stopped: `stop` was set meanwhile.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        poll = select.poll()  # not select(), which refuses descriptors beyond 1023
        poll.register(self._messages, select.POLLIN | select.POLLHUP)
        while b"\n" not in self._pending:
            if stop is not None and stop.is_set():
                raise Stopped(self.function)
            wait_s = _POLL_SECONDS if end is None else min(_POLL_SECONDS, max(0.0, end - time.monotonic()))
            if poll.poll(0 if self._ended else wait_s * 1000):
                data = os.read(self._messages, 1 << 20)
                self._pending += data
                if not data:
                    raise self._silent_end()
            elif self._ended:
                raise self._silent_end()
            elif end is not None and time.monotonic() >= end:
                raise TimeoutError(f"{self.function}: no message within {timeout_s} s")
            else:
                # A descendant that holds the pipe open must not hide that the child is gone: look once more, then stop.
                self._ended = self._has_ended()
        line, self._pending = self._pending.split(b"\n", 1)
        message = json.loads(line)
        if message["kind"] == "error":
            raise failures.decode(message["content"])
        return message["kind"], message["content"]

    def suspend(self) -> None:
        """Stop every process of the group (SIGSTOP) and wait until the child stands still."""
        self._signal(signal.SIGSTOP)
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Let a stopped group continue."""
        self._signal(signal.SIGCONT)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the child to end by itself; whether it did within `timeout_s` seconds."""
        end = time.monotonic() + timeout_s
        while not self._has_ended():
            if time.monotonic() >= end:
                return False
            time.sleep(0.005)
        return True

    def kill(self) -> None:
        """Kill whatever is left of the child and its descendants, and reap the child. It may be called twice."""
        if self.returncode is not None:
            return
        # While the leader is not reaped its number cannot be given to a stranger, so the group is killed first.
        watcher.kill_group(self.pid)
        watcher.kill_tagged(self._token)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        tree.unregister(self.pid)
        self.returncode = self._process.wait()
        os.close(self._messages)
        shutil.rmtree(self._scratch, ignore_errors=True)
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def _has_ended(self) -> bool:
        if self.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _silent_end(self) -> PlanishError:
        self.wait(2.0)
        self.kill()
        return failures.ended_silently(self.function, self.returncode or 0, self.log)

    def _signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def _send_line(self, text: str) -> None:
        if self._process.stdin is None:
            return
        data = memoryview(text.encode() + b"\n")
        with contextlib.suppress(BrokenPipeError):
            while data:
                data = data[self._process.stdin.write(data) :]
