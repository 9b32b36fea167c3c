"""Rows of JSONL and CSV files."""

from __future__ import annotations

import csv
import json
import string
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path, needed: Sequence[str]) -> list[Row]:
    """Returns the rows of a file, one dict a row.

    Args:
        path: ``.jsonl`` (an object a line), ``.csv`` or ``.tsv`` (names in the first line).
        needed: fields that every row must have.

    Raises:
        ValueError: another kind of file, a line that is no object, a missing field, or no rows;
            the message names file and line.
        OSError: the file cannot be read.
    """
    kind = path.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        numbered = _json_lines(path)
    elif kind in (".csv", ".tsv"):
        numbered = _table(path, "\t" if kind == ".tsv" else ",")
    else:
        raise ValueError(f"{path} ends in {kind or 'nothing'}; expected .jsonl, .csv or .tsv")
    rows = []
    for line, row in numbered:
        missing = [name for name in needed if row.get(name) is None]
        if missing:
            raise ValueError(
                f"{path}, line {line}: no {', '.join(missing)}; the row has {', '.join(row)}"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def fields_of(template: str) -> list[str]:
    """Returns the names of a format string's fields; a mask token is none of them."""
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    return [name for name in dict.fromkeys(names) if name != "mask"]


def index_labels(rows: list[Row], field: str, labels: Sequence[str]) -> list[Row]:
    """Returns the rows with the label's place in ``labels`` instead of its value.

    Raises:
        ValueError: a value that is not among them.
    """
    places = {value: i for i, value in enumerate(labels)}
    for number, row in enumerate(rows, 1):
        if str(row[field]) not in places:
            raise ValueError(
                f"row {number} has {field} {row[field]!r}; expected one of {', '.join(labels)}"
            )
    return [{**row, field: places[str(row[field])]} for row in rows]


def values_of(rows: list[Row], field: str) -> list[str]:
    """Returns the distinct values of a field, sorted: numbers by size, or else by spelling."""
    values = {str(row[field]) for row in rows}
    numbers = all(value.lstrip("-").isdecimal() for value in values)
    return sorted(values, key=int if numbers else str)


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    # Lines end in a newline alone: other separators may stand in a string as they are.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected an object, got {line[:40]}")
        yield number, row


def _table(path: Path, separator: str) -> Iterator[tuple[int, Row]]:
    # A document is one field. The limit is the module's, so it is put back.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=separator)
            yield from ((reader.line_num, row) for row in reader)
    except csv.Error as error:
        raise ValueError(f"{path}: {error}") from None
    finally:
        csv.field_size_limit(limit)
