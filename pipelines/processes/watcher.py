"""A tiny process that outlives a killed run just long enough to end everything the run started.

`kill -9` gives a process no chance to clean up, and a stopped child does not notice that its parent is gone. So a run
starts this file once (standard library only, own session) with the read end of a pipe as its stdin. The run writes
``+<process group>`` and ``-<process group>`` lines; when the pipe closes, for whatever reason, every group still
registered is killed, and so is every process whose environment carries the run's token: that catches grandchildren
that moved to a session of their own, as compiler pools do. The folder for their temporary files goes last.

Started as ``python -I -S watcher.py <pid of the run> <token> <folder for temporary files>``.
"""

import contextlib
import os
import select
import shutil
import signal
import sys

TREE_VARIABLE = "PLANISH_PROCESS_TREE"
POLL_SECONDS = 0.5


def tagged(token: str) -> list[int]:
    """Ids of the living processes whose environment carries `token`, this process and its ancestors excepted."""
    marker = token.encode()
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if not name.isdigit() or int(name) == os.getpid():
            continue
        # Gone in the meantime, a zombie, or another user's.
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as environment:
            for entry in environment.read().split(b"\0"):
                if entry.startswith(TREE_VARIABLE.encode() + b"=") and marker in entry:
                    found.append(int(name))
    return found


def kill_tagged(token: str) -> None:
    """Kill every process that carries `token`, until a look finds none (a process may fork while we look)."""
    for _ in range(20):
        processes = tagged(token)
        if not processes:
            return
        for process in processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)


def kill_group(group: int) -> None:
    """Kill every process of a process group; a stopped one dies too."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def watch(parent: int, token: str, scratch: str) -> None:
    """Follow the run's registrations until it is gone, then kill what is left of it and remove its temporary files."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    pending = b""
    # The pipe alone would do, but a process that the run forked without exec may hold its write end open.
    while os.getppid() == parent:
        readable, _, _ = select.select([0], [], [], POLL_SECONDS)
        if not readable:
            continue
        data = os.read(0, 65536)
        if not data:
            break
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            (groups.add if line[:1] == b"+" else groups.discard)(int(line[1:]))
    for group in groups:
        kill_group(group)
    kill_tagged(token)
    shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.argv[2], sys.argv[3])
