"""Budgets as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest
from zorba.apps.plan.budgets import read_budgets
from zorba.sizes import parse_bytes, show_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("2GiB", 2 << 30),
        (" 900 MB ", 900_000_000),
        ("1.5gb", 1_500_000_000),
        ("0.5 KiB", 512),
        ("123", 123),
        (123, 123),
        ("7B", 7),
    ],
)
def test_sizes(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "much", "1 parsec", "-3MB", "1e9", True, "1,5GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is no number of bytes: write"):
        parse_bytes(text)


def test_lists_and_files(tmp_path: Path) -> None:
    assert read_budgets("phone=1MB, desk = 2MiB") == {"phone": 1_000_000, "desk": 2 << 20}
    assert read_budgets("1kB,2kB") == {"client-0": 1000, "client-1": 2000}
    lines = tmp_path / "budgets.txt"
    lines.write_text("# ours\nphone=1MB\n\ndesk=2MB\n")
    assert read_budgets(str(lines)) == {"phone": 1_000_000, "desk": 2_000_000}
    record = tmp_path / "budgets.json"
    record.write_text('{"phone": "1MB", "desk": 5}')
    assert read_budgets(str(record)) == {"phone": 1_000_000, "desk": 5}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("phone=1MB,phone=2MB", "two budgets are for client 'phone'"),
        ("phone=lots", "budget of client 'phone': 'lots' is no number of bytes"),
        (" , ", "there are no budgets"),
    ],
)
def test_refused(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_budgets(text)


def test_a_name_given_twice_in_a_file(tmp_path: Path) -> None:
    record = tmp_path / "budgets.json"
    record.write_text('{"phone": 1, "phone": 2}')
    with pytest.raises(ValueError, match="two budgets are for client 'phone'"):
        read_budgets(str(record))
    record.write_text("{nothing")
    with pytest.raises(ValueError, match="is no JSON"):
        read_budgets(str(record))


def test_shown() -> None:
    assert show_bytes(3 << 20) == "3.0 MiB"
    assert show_bytes(3 << 30) == "3.0 GiB"
