"""Reads the fields of an event, whatever somebody wrote there.

Names, reasons and scores come from clients. No reader here raises: a field of another type than
expected counts as missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any, TypeGuard

Event = Mapping[str, Any]

_MAX_TEXT = 500


def clean(value: Any) -> str:
    """Returns text that is safe to show: one line, no control and no direction characters.

    Markup stays in it: whoever writes HTML or rich's markup must escape it.
    """
    shown = str(value)[:_MAX_TEXT]
    if shown.isprintable():  # as nearly all are: a page reads hundreds of thousands
        return shown
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in shown)


def text(event: Event, key: str) -> str:
    """Returns cleaned text; empty where there is none."""
    return clean(event.get(key) or "")


def number(event: Event, key: str) -> float | None:
    """Returns a finite number, or None."""
    value = event.get(key)
    # JSON has integers of any length; a float holds them up to 1e308.
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e308:
        return None
    return None if math.isnan(value) else float(value)


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value is a number of bytes or of things."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def whole(event: Event, key: str, default: int = 0) -> int:
    """Returns a count."""
    value = event.get(key)
    return value if is_count(value) else default


def table(event: Event, key: str) -> dict[str, Any]:
    """Returns an object by cleaned names; an empty one where there is none."""
    value = event.get(key)
    return {clean(k): v for k, v in value.items()} if isinstance(value, Mapping) else {}


def texts(event: Event, key: str) -> dict[str, str]:
    """Returns an object's values as cleaned text, by cleaned names."""
    return {name: clean(value) for name, value in table(event, key).items()}


def counts(event: Event, key: str) -> dict[str, int]:
    """Returns an object's counts, by cleaned names."""
    return {name: value for name, value in table(event, key).items() if is_count(value)}


def items(event: Event, key: str) -> list[Any]:
    """Returns a list; an empty one where there is none."""
    value = event.get(key)
    return value if isinstance(value, list) else []


def names(event: Event, key: str) -> list[str]:
    """Returns a list as cleaned text; an empty one where there is none."""
    return [clean(item) for item in items(event, key)]


def moment(event: Event) -> datetime | None:
    """Returns the event's time, or None."""
    try:
        time = datetime.fromisoformat(str(event.get("time")))
    except ValueError:
        return None
    return time if time.tzinfo else None
