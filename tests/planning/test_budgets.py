"""Budgets as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest
from zorba.apps.plan.settings import read_budgets
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


LISTED = {"phone": 1_000_000, "desk": 2 << 20}


def test_lists() -> None:
    assert read_budgets("phone=1MB, desk = 2MiB") == LISTED
    assert read_budgets("1kB,2kB") == {"client-0": 1000, "client-1": 2000}


@pytest.mark.parametrize(
    "content",
    ["# ours\nphone=1MB\n\ndesk=2MiB\n", '{"phone": "1MB", "desk": 2097152}'],
    ids=["lines", "json"],
)
def test_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "budgets").write_text(content)
    assert read_budgets(str(tmp_path / "budgets")) == LISTED


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("phone=1MB,phone=2MB", "two budgets are for client 'phone'"),
        ('{"phone": 1, "phone": 2}', "two budgets are for client 'phone'"),
        ("phone=lots", "budget of client 'phone': 'lots' is no number of bytes"),
        ("{nothing", "is no JSON"),
        (" , ", "there are no budgets"),
    ],
)
def test_refused(tmp_path: Path, text: str, told: str) -> None:
    if text.startswith("{"):
        (tmp_path / "budgets").write_text(text)
        text = str(tmp_path / "budgets")
    with pytest.raises(ValueError, match=told):
        read_budgets(text)


def test_shown() -> None:
    assert show_bytes(3 << 20) == "3.0 MiB"
    assert show_bytes(3 << 30) == "3.0 GiB"
