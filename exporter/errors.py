"""The errors of Planish: each says what happened, the value that caused it, and what to do about it."""

from __future__ import annotations

from typing import Any, ClassVar


class PlanishError(Exception):
    """Base of every error that Planish raises on purpose.

    Args:
        what: What happened, as a sentence without its final full stop.
        value: The value that caused it (a path, a key, a number); shown as given.
        remedy: What the user can do about it.
    """

    exit_status: ClassVar[int] = 4

    def __init__(self, what: str, value: Any = None, remedy: str | None = None) -> None:
        super().__init__(what, value, remedy)
        self.what = what
        self.value = value
        self.remedy = remedy

    def __str__(self) -> str:
        text = self.what if self.value is None else f"{self.what}: {self.value}"
        return text if self.remedy is None else f"{text}. {self.remedy}"

    def to_dict(self) -> dict[str, Any]:
        """The error as the command line's ``--json`` prints it."""
        value = None if self.value is None else str(self.value)
        return {"what": self.what, "value": value, "remedy": self.remedy, "exit": self.exit_status}


class GateError(PlanishError):
    """A gate said no: a required variant failed, or ``verify`` found a difference (exit status 1)."""

    exit_status = 1


class RequestError(PlanishError):
    """The request was wrong: a bad recipe, a missing file, an unknown task (exit status 2)."""

    exit_status = 2


class NotApplicableError(RequestError):
    """What was asked for does not apply to this model, such as a form in which nothing would change (exit status 2)."""


class EnvironmentLackError(PlanishError):
    """The environment lacks something: a package, hardware, disk space (exit status 3)."""

    exit_status = 3


class NoSpaceError(EnvironmentLackError):
    """A disk is full (exit status 3)."""


class InternalError(PlanishError):
    """A bug in Planish or in a library below it (exit status 4)."""

    exit_status = 4


class CancelledError(PlanishError):
    """The user interrupted the run (exit status 130)."""

    exit_status = 130


ERROR_BY_EXIT_STATUS: dict[int, type[PlanishError]] = {
    kind.exit_status: kind for kind in (GateError, RequestError, EnvironmentLackError, InternalError, CancelledError)
}


def missing_package(package: str, extra: str) -> EnvironmentLackError:
    """The error for an optional package that is not installed."""
    return EnvironmentLackError(
        "a package that this step needs is not installed", package, f"Install it with: pip install 'planish[{extra}]'"
    )


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, cut to a readable length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
