"""Machine and versions of every benchmark, and a table of ratios at the end of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from zorba import machine


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_disable_gc = True


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., None]:
    """Times a call: one warm-up, then ``rounds`` single calls, with what was moved beside it."""

    def run(
        call: Callable[[], object],
        weights: int,
        bytes_moved: int,
        rounds: int = 15,
        before: Callable[[], None] | None = None,
    ) -> None:
        moved = {"weights": weights, "bytes": bytes_moved}
        benchmark.extra_info.update(machine.describe() | moved)
        # What runs before a round is not part of its time.
        benchmark.pedantic(call, setup=before, rounds=rounds, iterations=1, warmup_rounds=1)
        median = benchmark.stats.stats.median
        benchmark.extra_info["ns_per_weight"] = median / weights * 1e9
        benchmark.extra_info["gb_per_s"] = bytes_moved / median / 1e9

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [b for b in getattr(session, "benchmarks", []) if "ns_per_weight" in b.extra_info]
    if not rows:
        return
    by_group: dict[str, list[Any]] = {}
    for row in rows:
        by_group.setdefault(row.group or "", []).append(row)
    write = terminalreporter.write_line
    for group, members in by_group.items():
        plain = next((m for m in members if "plain" in m.name), None)
        mezo = next((m for m in members if "mezo" in m.name), None)
        write("")
        info = members[0].extra_info
        write(f"{group}   ({info['cpu']}, {info['threads']} threads)")
        write(f"{'pass':44}{'ns/weight':>10}{'GB/s':>8}{'x MeZO':>9}{'of plain':>10}")
        for m in members:
            info = m.extra_info
            ns = info["ns_per_weight"]
            faster = f"{mezo.extra_info['ns_per_weight'] / ns:9.1f}" if mezo else f"{'':9}"
            share = f"{plain.extra_info['ns_per_weight'] / ns:10.2f}" if plain else ""
            write(f"{m.name:44}{ns:10.3f}{info['gb_per_s']:8.1f}{faster}{share}")
    write("")
    write("Medians of one run. plain: read, add a constant, write the same bytes with torch.")
