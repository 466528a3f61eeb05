"""How numbers, times and sentences of a report are written. Pure functions; ``None`` and NaN become an en dash."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

NOTHING = "–"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_BACKTICKS = re.compile(r"`([^`\n]+)`")
_COMMAND = re.compile(
    r"(?:(?<=^)|(?<=[\s:(]))"
    r"((?:(?:uv )?pip3? install|python3? -m \S+|make|planish|apt-get install|apt install|sudo|docker|conda install) "
    r"[^\s;]\S*(?:[ ](?!and |or |then |\()[^\s;]+)*)"
)


def dig(data: Any, *keys: str) -> Any:
    """The value under nested `keys`, or ``None`` where a step is missing or is no mapping."""
    for key in keys:
        if not isinstance(data, Mapping):
            return None
        data = data.get(key)
    return data


def mapping(data: Any, *keys: str) -> Mapping[str, Any]:
    """The mapping under nested `keys`, empty where there is none."""
    value = dig(data, *keys)
    return value if isinstance(value, Mapping) else {}


def listing(data: Any, *keys: str) -> list[Any]:
    """The list under nested `keys`, empty where there is none."""
    value = dig(data, *keys)
    return list(value) if isinstance(value, list | tuple) else []


def number(value: Any) -> float | None:
    """`value` as a finite float, else ``None`` (booleans and texts are no numbers)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def significant(value: Any, digits: int = 3) -> str:
    """Plain decimal notation with `digits` significant digits and thousands separators: 0.482, 48.2, 4,820."""
    x = number(value)
    if x is None:
        return NOTHING
    if x == 0:
        return "0"
    # Rounding first, because 9.996 with three digits is 10.0 and not 10.00.
    rounded = float(f"{x:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}".replace("-", "−")


def ratio(value: Any) -> str:
    """A speed-up: two decimals below ten (2.31×), three significant digits from there on."""
    x = number(value)
    if x is None:
        return NOTHING
    return f"{x:.2f}×" if abs(x) < 9.995 else f"{significant(x)}×"


def interval(low: Any, high: Any) -> str:
    """The two ends of a ratio's interval, without unit: 2.24–2.39."""
    if number(low) is None or number(high) is None:
        return ""
    return f"{ratio(low)[:-1]}–{ratio(high)[:-1]}"


def milliseconds(value: Any) -> str:
    """Three significant digits; the unit stands in the heading."""
    return significant(value)


def millijoules(value: Any) -> str:
    """Joules as millijoules with three significant digits: 28.2 mJ."""
    x = number(value)
    return NOTHING if x is None else f"{significant(1e3 * x)} mJ"


def watts(value: Any) -> str:
    """Whole watts: 166 W."""
    x = number(value)
    return NOTHING if x is None else f"{x:.0f} W"


def size(value: Any) -> str:
    """Bytes in decimal units with three significant digits: 90.9 MB."""
    x = number(value)
    if x is None:
        return NOTHING
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(x) >= scale * 0.9995:
            return f"{significant(x / scale)} {unit}"
    return f"{x:.0f} B"


def scientific(value: Any) -> str:
    """Two significant digits with a power of ten: 3.1×10⁻⁷; plain between 0.01 and 1000."""
    x = number(value)
    if x is None:
        return NOTHING
    if x == 0:
        return "0"
    mantissa, exponent = f"{x:.1e}".split("e")
    power = int(exponent)
    if -2 <= power <= 2:
        return significant(x, 2)
    return f"{mantissa}×10{str(power).translate(_SUPERSCRIPTS)}".replace("-", "−")


def decade(value: float) -> str:
    """A tick on a logarithmic axis: 10⁻⁷."""
    return f"10{str(round(math.log10(value))).translate(_SUPERSCRIPTS)}"


def cosine(value: Any) -> str:
    """Six decimals, cut and not rounded, so that 0.9999999 is not shown as a perfect 1."""
    x = number(value)
    if x is None:
        return NOTHING
    if x >= 1:
        return "1"
    return f"{math.floor(x * 1e6) / 1e6:.6f}".replace("-", "−")


def score(value: Any) -> str:
    """A metric's value: four decimals, six where four would round to a perfect 1."""
    x = number(value)
    if x is None:
        return NOTHING
    return cosine(x) if 0.99995 <= x < 1 else f"{x:.4f}".replace("-", "−")


def signed(value: Any, digits: int = 2) -> str:
    """A difference with its sign: +0.12, −0.30, 0.00."""
    x = number(value)
    if x is None:
        return NOTHING
    text = f"{abs(x):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{'+' if x > 0 else '−'}{text}"


def percent(value: Any, digits: int = 3) -> str:
    """A share as a percentage: 0.214 is 21.4 %."""
    x = number(value)
    return NOTHING if x is None else f"{significant(100 * x, digits)} %"


def count(value: Any) -> str:
    """An integer with thousands separators."""
    x = number(value)
    return NOTHING if x is None else f"{x:,.0f}"


def large_count(value: Any) -> str:
    """A number of parameters: 22.7 million."""
    x = number(value)
    if x is None:
        return NOTHING
    for unit, scale in (("billion", 1e9), ("million", 1e6)):
        if x >= scale * 0.9995:
            return f"{significant(x / scale)} {unit}"
    return count(x)


def compact(value: Any) -> str:
    """A large number with a letter, for narrow columns: 22.7 M."""
    x = number(value)
    if x is None:
        return NOTHING
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= scale * 0.9995:
            return f"{significant(x / scale)} {unit}"
    return count(x)


def duration(value: Any) -> str:
    """Seconds as people say them: 0.42 s, 8.1 s, 1 min 23 s."""
    x = number(value)
    if x is None:
        return NOTHING
    if x < 59.95:
        return f"{significant(x, 2) if x < 9.95 else f'{x:.0f}'} s"
    minutes, seconds = divmod(round(x), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def when(value: Any) -> str:
    """An ISO 8601 time as 31 July 2026, 14:02 UTC; anything else as it is."""
    if not isinstance(value, str):
        return ""
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        return value
    if moment.tzinfo is not None:
        moment = moment.astimezone(UTC)
    zone = " UTC" if moment.tzinfo is not None else ""
    return f"{moment.day} {moment:%B %Y, %H:%M}{zone}"


def point(name: str) -> str:
    """An operating point as it reads best: ``1x16`` is 1 × 16; ``overall`` stays."""
    return re.sub(r"(?<=\d)x(?=\d)", " × ", name)


def words(key: str) -> str:
    """A key of the document as words: ``rms_relative`` is rms relative."""
    return key.replace("_", " ")


def metric_name(name: Any) -> str:
    """A metric's name in a sentence: ``macro-f1`` is macro F1."""
    return re.sub(r"\bf1\b", "F1", re.sub(r"[-_]", " ", str(name))) if name else "the metric"


def shown(value: Any) -> str:
    """Any leaf of the document as text: lists by comma, mappings as ``key: value``."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) or NOTHING
    if isinstance(value, list | tuple):
        return ", ".join(shown(item) for item in value) or NOTHING
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) else NOTHING
    return str(value)


def short(text: str, limit: int = 150) -> str:
    """`text` cut at a word near `limit` characters, with an ellipsis when something was cut."""
    if len(text) <= limit:
        return text
    head = text[:limit]
    cut = head.rfind(" ")
    return (head[:cut] if cut > limit // 2 else head).rstrip(" ,;:.") + " …"


def with_commands(text: str) -> list[tuple[bool, str]]:
    """Split a sentence into ``(is a command, text)`` parts: what stands in backticks, or looks like a shell command."""
    parts: list[tuple[bool, str]] = []
    pattern = _BACKTICKS if _BACKTICKS.search(text) else _COMMAND
    position = 0
    for match in pattern.finditer(text):
        command = match.group(1)
        # The full stop or bracket that ends the sentence belongs to the sentence.
        trimmed = command if pattern is _BACKTICKS else command.rstrip(".,)")
        start = match.start() if pattern is _BACKTICKS else match.start(1)
        end = match.end() if pattern is _BACKTICKS else match.start(1) + len(trimmed)
        if start > position:
            parts.append((False, text[position:start]))
        parts.append((True, trimmed))
        position = end
    if position < len(text):
        parts.append((False, text[position:]))
    return parts
