"""Budgets as people write them."""

from __future__ import annotations

import json
from pathlib import Path

from zorba.sizes import parse_bytes


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


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a list that is too long for a name
        return False
