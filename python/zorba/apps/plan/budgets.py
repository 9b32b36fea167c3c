"""Budgets as people write them."""

from __future__ import annotations

import json
import re
from pathlib import Path

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[f"{_letter}b"] = 1000**_power
    _UNITS[f"{_letter}ib"] = 1024**_power
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Returns whole bytes from ``"2GiB"``, ``"900 MB"``, ``"1.5gb"`` or a plain number.

    MB is 1,000,000 bytes and MiB 1,048,576.

    Raises:
        ValueError: it is no such thing.
    """
    match = _SIZE.fullmatch(str(text))
    unit = None if match is None else _UNITS.get(match[2].lower())
    if isinstance(text, bool) or match is None or unit is None:
        raise ValueError(f"{text!r} is no number of bytes: write 900MB, 2GiB or 1500000000")
    whole, _, fraction = match[1].partition(".")
    return int(int(whole + fraction) * unit // 10 ** len(fraction))


def read_budgets(text: str) -> dict[str, int]:
    """Returns the budget of each client, by name.

    Args:
        text: budgets by commas, ``"phone=300MB,laptop=2GiB"`` or ``"300MB,2GiB"``, where clients
            are called client-0, client-1, ...; or a file with one a line, or with a JSON object
            from name to budget.

    Raises:
        ValueError: a budget that is none, two clients of one name, or no clients.
    """
    path = Path(text)
    pairs: list[tuple[str, str | int]] = []
    content = path.read_text() if _is_file(path) else None
    if content is not None and content.lstrip().startswith("{"):
        try:
            pairs = json.loads(content, object_pairs_hook=list)
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
    else:
        parts = text.split(",") if content is None else content.splitlines()
        for part in (p.strip() for p in parts):
            if part and not part.startswith("#"):
                name, equals, size = part.rpartition("=")
                pairs.append((name.strip() if equals else f"client-{len(pairs)}", size))
    budgets: dict[str, int] = {}
    for name, amount in pairs:
        if name in budgets:
            raise ValueError(f"two budgets are for client {name!r}")
        try:
            budgets[name] = parse_bytes(amount)
        except ValueError as error:
            raise ValueError(f"budget of client {name!r}: {error}") from None
    if not budgets:
        raise ValueError(f"there are no budgets in {text!r}")
    return budgets


def show_bytes(count: int) -> str:
    """Returns bytes in MiB or GiB, as people read them."""
    if abs(count) < 1 << 30:
        return f"{count / (1 << 20):.1f} MiB"
    return f"{count / (1 << 30):.2f} GiB"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a list that is too long for a name
        return False
