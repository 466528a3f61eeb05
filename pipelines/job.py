"""Entry of a child process: ``python -m pipelines.job <parent's pid> <fd for messages>``, the request on stdin."""

from __future__ import annotations

import importlib
import logging
import resource
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from exporter.orphans import die_with_parent
from pipelines.processes import failures, inside


def main() -> None:
    """Run the one function asked for, send its result or its error, and end."""
    parent, messages_fd = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    inside.open_line(messages_fd)
    request = next(inside.commands(), None)
    if request is None:  # the parent changed its mind
        return
    sys.path[:] = request["path"]
    sys.argv[:] = [request["function"]]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if (limit := request["memory_limit_bytes"]) is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        value = function_named(request["function"])(request["arguments"])
        inside.send("result", {"value": value, "peak_rss_bytes": inside.peak_rss_bytes()})
    except BaseException as error:
        traceback.print_exc()
        places = [request["arguments"].get("folder"), tempfile.gettempdir()]
        error_seen = failures.as_planish_error(
            error,
            log=Path(request["log"]),
            doing=request["function"],
            places=[place for place in places if isinstance(place, str)],
        )
        inside.send("error", failures.encode(error_seen))
        sys.exit(1)


def function_named(name: str) -> Any:
    """What ``module:function`` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


if __name__ == "__main__":
    main()
