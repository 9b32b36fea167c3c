"""Which backend serves a test of the kernels, and which combinations of values a test runs with.

``server`` forces a backend and instruction set through the environment, as a user would, and fails
the test if another one served. A test runs with every pair of values of the axes that it names
(``AXES``, and those of a mark ``covering``); with ``--full``, with every combination.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import zorba_kernels as zk
from tests.conftest import INTERPRETED
from tests.covering import parametrize
from tests.kernels.bits import DTYPES
from zorba_kernels import dispatch
from zorba_kernels.build import extension
from zorba_kernels.dispatch import Backend, choose

CPU_ISAS = {  # instruction sets of the cpu backend, and the processor flags that each needs
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"},
    "avx2": {"avx2", "fma"},
    "baseline": set(),
}


def processor_lacks(isa: str) -> str | None:
    if Path("/proc/cpuinfo").is_file():
        text = Path("/proc/cpuinfo").read_text()
        line = next((s for s in text.splitlines() if s.startswith("flags")), "")
        missing = sorted(CPU_ISAS[isa] - set(line.split()))
        return f"this processor lacks {', '.join(missing)}" if missing else None
    return None if extension()[0].cpu_runs(isa) else f"this processor does not run {isa}"


LACKING = {isa: reason for isa in CPU_ISAS if (reason := processor_lacks(isa)) is not None}
COMPILED = (
    *(f"cpu-{isa}" for isa in CPU_ISAS if isa not in LACKING),
    *(["triton"] if INTERPRETED else []),
)
AXES = {
    "server": ("reference", *COMPILED),
    "compiled": COMPILED,  # without the reference: for tests that compare with it
    "dtype": DTYPES,
    "rounding": zk.noise.ROUNDINGS,
    "distribution": zk.noise.DISTRIBUTIONS,
    "size": (0, 1, 63, 1000, 4097),  # elements, around the edges of blocks, tiles and vectors
}
"""Values of arguments that many tests have."""

not_interpreted = pytest.mark.not_interpreted  # with the reason


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--server") == "triton" and not INTERPRETED:
        raise pytest.UsageError("--server=triton needs TRITON_INTERPRET=1 (make test-interpret)")


def pytest_report_header() -> list[str]:
    return [f"kernels: cpu-{isa} is not tested: {reason}" for isa, reason in LACKING.items()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives a test its rows of values; arguments with a ``parametrize`` of their own keep it."""
    mark = metafunc.definition.get_closest_marker("covering")
    axes = dict(mark.kwargs) if mark is not None else {}
    marks = metafunc.definition.iter_markers("parametrize")
    own = {name for m in marks for name in _names(m)}
    for name, values in AXES.items():
        if name in metafunc.fixturenames and name not in axes and name not in own:
            axes[name] = values
    served = [name for name in ("server", "compiled") if name in axes]
    for name in served:
        axes[name] = [server for server in axes[name] if _runs(metafunc, server)]
    if not axes:
        return
    parametrize(metafunc, axes, served)


def _names(mark: pytest.Mark) -> list[str]:
    names = mark.args[0] if mark.args else mark.kwargs["argnames"]
    return [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)


def _runs(metafunc: pytest.Metafunc, server: str) -> bool:
    only = metafunc.config.getoption("--server")
    interpreted = metafunc.definition.get_closest_marker("not_interpreted") is None
    return (only is None or only == server) and (server != "triton" or interpreted)


@pytest.fixture
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """``reference``, ``cpu-<isa>`` or ``triton``, which must serve calls without ``backend=``."""
    asked, _, isa = request.param.partition("-")
    if isa:
        compiled, reason = extension()
        assert compiled is not None, reason
        assert compiled.cpu_isa(isa) == isa
    monkeypatch.setenv("ZORBA_BACKEND", asked)
    monkeypatch.setenv("ZORBA_CPU_ISA", isa)
    calls = 0

    def checked(name: str | None, device: torch.device) -> Backend:
        nonlocal calls
        chosen = choose(name, device)
        if name is None:
            assert chosen.name == asked, f"asked for {asked}, {chosen.name} served"
            assert os.environ["ZORBA_CPU_ISA"] == isa
            calls += 1
        return chosen

    monkeypatch.setattr(dispatch, "choose", checked)
    yield request.param
    assert calls, "the test called nothing on the backend that it is for"


compiled = server  # with values of its own: see AXES
