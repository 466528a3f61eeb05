"""A parent to be killed: ``python parent.py <log> <what>`` runs a job and prints the ids of the processes in it."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from pipelines.lanes import side_by_side
from pipelines.processes import Child, run_job

HERE = "tests.pipelines.processes.jobs_to_run"


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    log, what = Path(sys.argv[1]), sys.argv[2]
    if what == "stopped":
        with Child(f"{HERE}:family", {}, log=log) as child:
            _, text = child.receive(60)
            child.suspend()
            say(text)
            say("ready")
            time.sleep(600)
    elif what == "forked":  # a process forked without exec holds our pipes open
        with Child(f"{HERE}:sleep", {}, log=log) as child:
            child.receive(60)
            if (forked := os.fork()) == 0:
                time.sleep(600)
            say(f"{child.pid}")
            Path(log).with_suffix(".forked").write_text(str(forked))
            say("ready")
            time.sleep(600)
    elif what == "leaves":  # forgets to end its child
        child = Child(f"{HERE}:family", {}, log=log)
        _, text = child.receive(60)
        child.suspend()
        say(text)
        say("ready")
    else:
        seen: list[str] = []
        lock, stop = threading.Lock(), threading.Event()

        def on_line(text: str) -> None:
            with lock:
                seen.append(text)
                say(text)
                if len(seen) == (1 if what == "running" else 2):
                    say("ready")

        def work() -> None:
            arguments = {"nested": what == "nested", "log": str(log)}
            run_job(f"{HERE}:family", arguments, log=log, on_line=on_line, stop=stop)

        try:
            side_by_side([work] * (3 if what == "lanes" else 1), 2, stop)
        except KeyboardInterrupt:
            say("interrupted")
            sys.exit(130)


if __name__ == "__main__":
    main()
