"""The fixture of every benchmark, and the tables at the end of a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.bench import Bench, sizes_of
from benchmarks.record import lines


def pytest_configure(config: pytest.Config) -> None:
    """Keeps collections of garbage out of what pytest-benchmark times."""
    config.option.benchmark_disable_gc = True
    if config.getoption("rehearse", False):
        torch.set_num_threads(1)  # small work is done before other threads are awake


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out checks of a GPU where there is none, unless they are rehearsed."""
    if not torch.cuda.is_available() and not config.getoption("rehearse", False):
        gpu = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a benchmark of a table's passes once for each table of the device."""
    sizes = sizes_of(metafunc.config)
    for name, titles in (("title", sizes.tables), ("compared_title", sizes.compared)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, list(titles))


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.node)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind)]
    measures = [row for r in reports for row in dict(r.user_properties).get("measures", [])]
    for line in lines(measures):
        terminalreporter.write_line(line)
