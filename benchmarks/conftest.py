"""What every benchmark gets: a device, sizes, calls timed in turn, and a place for its findings."""

from __future__ import annotations

import os
import random
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from benchmarks import sizes as all_sizes
from benchmarks.findings import Findings
from benchmarks.record import lines
from benchmarks.sizes import Sizes
from benchmarks.timing import GPU_BACKENDS, Call, InTurn, Times, time_in_turn


def pytest_configure(config: pytest.Config) -> None:
    """Keeps collections of garbage out of what pytest-benchmark times."""
    config.option.benchmark_disable_gc = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips checks of a GPU where there is none, unless they are rehearsed."""
    if torch.cuda.is_available() or rehearses(config):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch.cuda.is_available() is False"))


def rehearses(config: pytest.Config) -> bool:
    """Whether this run goes through everything in small, on the CPU."""
    return bool(config.getoption("rehearse", False))


def sizes_of(config: pytest.Config) -> Sizes:
    """Returns how much to do: on the GPU, where there is one."""
    if rehearses(config):
        return all_sizes.REHEARSAL
    return all_sizes.GPU if torch.cuda.is_available() else all_sizes.CPU


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a benchmark of a table's passes once for each table of the device."""
    sizes = sizes_of(metafunc.config)
    for name, titles in (("title", sizes.tables), ("compared_title", sizes.compared)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, list(titles))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU, where there is one."""
    if rehearses(request.config):
        torch.set_num_threads(1)  # small work is done before other threads are awake
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def sizes(request: pytest.FixtureRequest) -> Sizes:
    """How much to do on the device."""
    return sizes_of(request.config)


@pytest.fixture(scope="session")
def backends(device: torch.device) -> list[str]:
    """Backends to compare and measure on the device, the preferred one first."""
    import zorba_kernels as zk  # not earlier: it loads the extension, which a test builds

    wanted = GPU_BACKENDS if device.type == "cuda" else ("cpu",)
    serving = {row.name for row in zk.backends(device) if row.available}
    return [name for name in wanted if name in serving]


@pytest.fixture
def findings(request: pytest.FixtureRequest) -> Findings:
    """Where a test puts what it finds."""
    return Findings(request)


@pytest.fixture
def rng(findings: Findings) -> random.Random:
    """Inputs that differ every run; ``ZORBA_TEST_SEED`` repeats them."""
    seed = int(os.environ.get("ZORBA_TEST_SEED") or secrets.randbits(32))
    findings.facts["seed"] = seed
    return random.Random(seed)


@pytest.fixture(scope="session")
def left(request: pytest.FixtureRequest) -> Callable[[], float]:
    """Returns the seconds until this process should be through."""
    deadline = request.config.getoption("deadline", None) or time.monotonic() + 3600
    return lambda: deadline - time.monotonic()


@pytest.fixture
def in_turn(device: torch.device, sizes: Sizes, left: Callable[[], float]) -> InTurn:
    """Times calls in turn; skips the test, with the reason, where time is too short for that."""

    def run(calls: Mapping[str, Call]) -> dict[str, Times]:
        try:
            return time_in_turn(calls, device, sizes.runs, left())
        except TimeoutError as error:
            pytest.skip(f"left out: {error}")

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints what was measured."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind)]
    measures = [row for r in reports for row in dict(r.user_properties).get("measures", [])]
    for line in lines(measures):
        terminalreporter.write_line(line)
