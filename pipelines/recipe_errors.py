"""What is wrong with a recipe, said with the key, the value and what would be right, instead of a validation trace."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from exporter.errors import RequestError


class Wrong(ValueError):
    """Raised by the recipe's own validators: what is wrong, the value, and what would be right.

    Args:
        key: The key below the place that is being validated, where pydantic cannot know it.
    """

    def __init__(self, what: str, value: Any, remedy: str, key: str | None = None) -> None:
        super().__init__(what)
        self.what, self.value, self.remedy, self.key = what, value, remedy, key


_MUST_BE = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text (quote it if it looks like a number or a date)",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def request_error(error: ValidationError, model: type[BaseModel]) -> RequestError:
    """The `RequestError` that says everything that `error` found, with dotted keys."""
    findings = [_finding(dict(item), model) for item in error.errors(include_url=False)]
    if len(findings) == 1:
        key, what, value, remedy = findings[0]
        return RequestError(f"recipe key {key!r}: {what}" if key else f"the recipe is wrong: {what}", value, remedy)
    said = [
        f"{key or 'recipe'}: {what} ({value}), {remedy[:1].lower()}{remedy[1:].rstrip('.')}"
        for key, what, value, remedy in findings
    ]
    return RequestError(f"the recipe has {len(findings)} errors", "; ".join(said), "Correct each of them")


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key that a recipe of type `model` may hold, sections first."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from known_keys(part, f"{prefix}{name}.")


def _finding(item: dict[str, Any], model: type[BaseModel]) -> tuple[str, str, Any, str]:
    """``(dotted key, what is wrong, the value, what would be right)`` of one of pydantic's findings."""
    kind, context = item["type"], item.get("ctx", {})
    key = ".".join(str(part) for part in item["loc"])
    value = _short(item["input"])
    if kind == "value_error" and isinstance(wrong := context["error"], Wrong):
        return ".".join(part for part in (key, wrong.key) if part), wrong.what, _short(wrong.value), wrong.remedy
    if kind == "extra_forbidden":
        return key, "unknown key", value, _nearest(key, model)
    if kind == "missing":
        return key, "is missing", "nothing given", "Give it a value"
    if kind == "literal_error":
        return key, "unknown choice", value, f"Choose {context['expected'].replace(chr(39), '')}"
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return key, "out of range", value, f"It must be {words} {context[name]}"
    if kind == "finite_number":
        return key, "out of range", value, "It must be a finite number"
    if kind in ("too_short", "string_too_short"):
        return key, "is empty", value, "Give at least one"
    if kind == "string_too_long":
        return key, "is too long", value, f"It may have {context['max_length']} characters"
    if kind == "string_pattern_mismatch":
        return key, "not of the right form", value, f"It must match {context['pattern']}"
    if kind in _MUST_BE:
        return key, "wrong type", value, f"It must be {_MUST_BE[kind]}"
    return key, str(item["msg"]), value, "Correct it"


def _nearest(key: str, model: type[BaseModel]) -> str:
    keys = list(known_keys(model))
    section, _, last = key.rpartition(".")
    siblings = [k for k in keys if k.rpartition(".")[0] == section]
    if close := difflib.get_close_matches(key, siblings, n=1, cutoff=0.6):
        return f"Did you mean {close[0]!r}?"
    if moved := [k for k in keys if k.rpartition(".")[2] == last]:
        return f"Did you mean {moved[0]!r}?"
    if close := difflib.get_close_matches(key, keys, n=1, cutoff=0.6):
        return f"Did you mean {close[0]!r}?"
    return f"Known keys{' there' if section else ''}: {', '.join(k.rpartition('.')[2] for k in siblings) or 'none'}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
