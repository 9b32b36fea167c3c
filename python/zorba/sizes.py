"""Numbers of bytes as people write and read them."""

from __future__ import annotations

import re

_LETTERS = "kmgt"
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:(?:([kmgt])(i?))?b)?\s*", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """Returns whole bytes from ``"2GiB"``, ``"900 MB"``, ``"1.5gb"`` or a plain number.

    MB is 1,000,000 bytes and MiB 1,048,576. ValueError: the text is no number of bytes.
    """
    match = _SIZE.fullmatch(str(text))
    if match is None:
        raise ValueError(f"{text!r} is no number of bytes: write 900MB, 2GiB or 1500000000")
    number, letter, binary = match.groups()
    unit = (1024 if binary else 1000) ** (1 + _LETTERS.index(letter.lower())) if letter else 1
    # In integers: a float would round a large budget, and budgets hold to the byte.
    whole, _, fraction = number.partition(".")
    count: int = int(whole + fraction) * unit // 10 ** len(fraction)
    return count


def unit_of(count: float) -> tuple[int, str]:
    """Returns the largest unit that is not above a number of bytes: its bytes, and its name."""
    for power in range(len(_LETTERS), 0, -1):
        if abs(count) >= 1024**power:
            return 1024**power, f"{_LETTERS[power - 1].upper()}iB"
    return 1, "B"


def show_bytes(count: float) -> str:
    """Returns bytes in words: ``512 B``, ``1.5 KiB``, ``2.0 GiB``."""
    unit, name = unit_of(count)
    return f"{count:.0f} B" if unit == 1 else f"{count / unit:,.1f} {name}"
