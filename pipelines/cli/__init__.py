"""The command line. This module loads nothing but typer; each command imports what it needs when it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from exporter.errors import PlanishError

_BUG = 4
_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run ``planish`` and end the process with its exit status."""
    sys.exit(run_command(sys.argv[1:] if arguments is None else arguments))


def run_command(arguments: list[str]) -> int:
    """Run one command line and return its exit status (0 to 4, 130), as the design fixes them."""
    import typer
    from typer.exceptions import TyperException

    from pipelines.cli.commands import app

    as_json = "--json" in arguments
    try:
        status = app(args=arguments, standalone_mode=False, prog_name="planish")
        if status == _INTERRUPTED:  # what typer makes of Ctrl-C, without a word
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except typer.Exit as end:
        return end.exit_code
    except (KeyboardInterrupt, typer.Abort):
        kept = "it begins anew" if "engine" in arguments[:1] else "it goes on where it was"
        if "--no-cache" in arguments:
            kept = "it begins anew, for --no-cache keeps nothing"
        return _fail("interrupted", None, f"Run the same command again: {kept}", _INTERRUPTED, as_json)
    except TyperException as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        context = getattr(error, "ctx", None)
        command = "planish" if context is None else context.command_path
        return _fail(message.rstrip("."), None, f"{command} --help says what there is", 2, as_json)
    except SystemExit as end:  # typer ends the process itself, with 1, when nobody reads stdout any more
        if isinstance(end.__context__, BrokenPipeError):
            return 0
        raise
    except Exception as error:
        return _fail_with(error, as_json)


def _fail_with(error: Exception, as_json: bool) -> int:
    from pipelines.processes import as_planish_error
    from pipelines.processes.failures import see

    told: PlanishError = as_planish_error(error, log=None, doing="planish")
    remedy = told.remedy
    if told.exit_status == _BUG and (told is not error or remedy is None):  # a job names its own log
        remedy = see(_log(error))
    return _fail(told.what, told.value, remedy, told.exit_status, as_json)


def _log(error: Exception) -> Path | None:
    """A file with everything about an error that nobody foresaw; `None` where none can be written."""
    import tempfile
    import traceback

    from exporter.errors import PlanishError
    from pipelines.cache import log_folder

    try:
        folder = log_folder()
    except PlanishError:  # the cache may be the very trouble
        folder = Path(tempfile.gettempdir())
    try:
        fd, name = tempfile.mkstemp(prefix="error-", suffix=".log", dir=folder, text=True)
        with open(fd, "w", encoding="utf-8") as file:
            file.write(f"planish {' '.join(sys.argv[1:])}\n\n{''.join(traceback.format_exception(error))}")
    except OSError:
        return None
    return Path(name)


def _fail(what: str, value: Any, remedy: str | None, status: int, as_json: bool) -> int:
    if as_json:
        document = {"what": what, "value": None if value is None else str(value), "remedy": remedy, "exit": status}
        print(json.dumps({"error": document}))
        return status
    text = what if value is None else f"{what}: {value}"
    print(f"error: {text}", file=sys.stderr)
    if remedy:
        print(f"  {remedy}", file=sys.stderr)
    return status
