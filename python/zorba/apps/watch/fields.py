"""Reads the fields of an event, whatever somebody wrote there, and puts figures in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, TypeGuard

import numpy as np

_MAX_TEXT = 500


def clean(value: Any) -> str:
    """Returns text that is safe to show: one line, no control and no direction characters.

    It says nothing of markup, which the one who writes markup must escape.
    """
    text = str(value)[:_MAX_TEXT]
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


def number(fields: Mapping[str, Any], key: str) -> float | None:
    """Returns a finite number, or None."""
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def whole(fields: Mapping[str, Any], key: str, default: int = 0) -> int:
    """Returns a count."""
    value = fields.get(key)
    return value if is_count(value) else default


def table(fields: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Returns an object by cleaned names; an empty one where there is none."""
    value = fields.get(key)
    return {clean(k): v for k, v in value.items()} if isinstance(value, Mapping) else {}


def counts(fields: Mapping[str, Any], key: str) -> dict[str, int]:
    """Returns an object's counts by cleaned names."""
    return {k: v for k, v in table(fields, key).items() if is_count(v)}


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value is a number of bytes or of things."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def sequence(fields: Mapping[str, Any], key: str) -> list[Any]:
    """Returns a list; an empty one where there is none."""
    value = fields.get(key)
    return value if isinstance(value, list) else []


def moment(fields: Mapping[str, Any]) -> datetime | None:
    """Returns the event's time, or None."""
    try:
        time = datetime.fromisoformat(str(fields.get("time")))
    except ValueError:
        return None
    return time if time.tzinfo else None


def unit(most: float) -> tuple[int, str]:
    """Returns the unit that a number of bytes is best told in: its bytes, and its name."""
    for power, name in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if most >= 1 << power:
            return 1 << power, name
    return 1, "B"


def size(count: float) -> str:
    """Returns bytes in words: ``512 B``, ``1.5 KiB``, ``2.0 GiB``."""
    one, name = unit(abs(count))
    return f"{count:.0f} B" if one == 1 else f"{count / one:,.1f} {name}"


def duration(seconds: float) -> str:
    """Returns a time in words: ``0.31 s``, ``42 s``, ``3:05 min``, ``2:10 h``, ``3 d 4 h``."""
    seconds = max(0.0, seconds)
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d} h" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def decimal(value: float) -> str:
    """Returns a loss or a score in words; one that is beyond all reason stays short."""
    return f"{value:.3f}" if abs(value) < 1e5 else f"{value:.2e}"


def usual_range(values: Sequence[float], reach: float = 20.0) -> tuple[float, float]:
    """Returns the range to show values in: all of them, but for what is far from all others.

    A client may tell any finite loss, and one that comes back after a month gets a month's log:
    neither should flatten the rest of a picture.

    Args:
        values: at least one.
        reach: how far beyond nine tenths of the values, in widths of theirs.
    """
    low, high = (
        np.quantile(values, 0.05, method="higher"),
        np.quantile(values, 0.95, method="lower"),
    )
    room = reach * max(abs(float(high - low)), 0.05 * abs(float(high)))
    return (
        max(min(values), min(float(low), float(high)) - room),
        min(max(values), max(float(low), float(high)) + room),
    )


def metric(name: str) -> str:
    """Returns the name of a score as it is shown."""
    return "AUC" if name == "auc" else name.replace("_", " ")
