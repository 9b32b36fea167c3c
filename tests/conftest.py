"""Fixtures shared by all suites: who serves a call, and fresh random inputs.

``server`` runs a test once for each backend and instruction set, forced through the environment as
a user would, and fails the test if another one served. ``rng`` makes inputs from a seed that is new
every run and printed when the test fails; ``ZORBA_TEST_SEED`` gives it back.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import zorba_kernels.eager as eager
from torch import Tensor

import zorba_kernels as zk
from zorba_kernels.build import extension
from zorba_kernels.dispatch import choose

CPU_ISAS = {
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"},
    "avx2": {"avx2", "fma"},
    "baseline": set(),
}
"""Instruction sets of the cpu backend, and the processor flags that each needs."""

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") != "0"
"""Whether this process serves CPU tensors with Triton's interpreter: ``make test-interpret``."""

if INTERPRETED:
    from tests.kernels import interpreter

    interpreter.correct()

SERVERS = ("reference", *(f"cpu-{isa}" for isa in CPU_ISAS), *(["triton"] if INTERPRETED else []))
COMPILED = tuple(server for server in SERVERS if server != "reference")
SIZES = (0, 1, 63, 1000, 4097)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

not_interpreted = pytest.mark.not_interpreted
"""Marks a test, with its reason, that Triton's interpreter does not run."""

_rng_seed = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --server, which restricts the suite to one backend and instruction set."""
    parser.addoption(
        "--server", choices=(*SERVERS, "triton"), help="run backend tests on this one only"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker; refuses --server=triton without the interpreter."""
    config.addinivalue_line("markers", "not_interpreted(reason): not for Triton's interpreter")
    if config.getoption("--server") == "triton" and not INTERPRETED:
        raise pytest.UsageError("--server=triton needs TRITON_INTERPRET=1 (make test-interpret)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests that need a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch.cuda.is_available() is False"))


def pytest_make_parametrize_id(val: object) -> str | None:
    """Names dtypes as in bfloat16 instead of torch.bfloat16."""
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Prints the seed of the test's random inputs when it fails."""
    report = yield
    if report.failed and _rng_seed in item.stash:
        seed = item.stash[_rng_seed]
        report.sections.append(("random inputs", f"repeat with ZORBA_TEST_SEED={seed}"))
    return report


# --- Who serves ----------------------------------------------------------------------------------


def processor_lacks(isa: str) -> str | None:
    """Returns which flags of an instruction set the processor lacks, or None."""
    if Path("/proc/cpuinfo").is_file():
        text = Path("/proc/cpuinfo").read_text()
        line = next((s for s in text.splitlines() if s.startswith("flags")), "")
        missing = sorted(CPU_ISAS[isa] - set(line.split()))
        return f"this processor lacks {', '.join(missing)}" if missing else None
    return None if extension()[0].cpu_runs(isa) else f"this processor does not run {isa}"


def force_server(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes ``reference``, ``cpu-<isa>`` or ``triton`` serve every call that names no backend."""
    backend, _, isa = name.partition("-")
    if isa:
        lacking = processor_lacks(isa)
        if lacking:
            pytest.skip(lacking)
        compiled, reason = extension()
        assert compiled is not None, reason
        assert compiled.cpu_isa(isa) == isa
    monkeypatch.setenv("ZORBA_BACKEND", backend)
    monkeypatch.setenv("ZORBA_CPU_ISA", isa)


class Served:
    """What the fixtures ``server`` and ``compiled`` give: the name, and which calls it served."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls = 0

    def choose(self, name: str | None, device: torch.device) -> ModuleType:
        """Takes the place of ``dispatch.choose``: checks who was chosen."""
        module: ModuleType = choose(name, device)
        if name is None:
            backend, _, isa = self.name.partition("-")
            asked = f"zorba_kernels.backends.{backend}"
            assert module.__name__ == asked, f"asked for {asked}, {module.__name__} served"
            assert os.environ["ZORBA_CPU_ISA"] == isa
            self.calls += 1
        return module


def _served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    only = request.config.getoption("--server")
    if only not in (None, request.param):
        pytest.skip(f"--server={only}")
    mark = request.node.get_closest_marker("not_interpreted")
    if request.param == "triton" and mark is not None:
        pytest.skip(f"not in Triton's interpreter: {mark.args[0]}")
    force_server(request.param, monkeypatch)
    served = Served(request.param)
    monkeypatch.setattr(eager, "choose", served.choose)
    yield served
    assert served.calls, "the test called nothing on the backend that it is for"


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """Every backend and instruction set in turn, which must serve calls without ``backend=``."""
    yield from _served(request, monkeypatch)


@pytest.fixture(params=COMPILED)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """The same without ``reference``: for tests that compare with it."""
    yield from _served(request, monkeypatch)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- Random inputs -------------------------------------------------------------------------------


class Random:
    """Random inputs from one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, bits: int) -> int:
        """Uniform below 2**bits, for up to 64 bits."""
        low, high = (self._below(1 << 32) for _ in range(2))
        return (high << 32 | low) >> (64 - bits)

    def integers(self, count: int, bits: int = 64) -> list[int]:
        """Several of them."""
        return [self.integer(bits) for _ in range(count)]

    def coefs(self, *shape: int) -> Tensor:
        """Finite float32 of magnitudes from 1e-8 to 1."""
        size = 10.0 ** (-8.0 * torch.rand(shape, generator=self.generator))
        return size * torch.randn(shape, generator=self.generator).sign()

    def weights(self, shape: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Normals of several magnitudes, some of them subnormal in the dtype or zero.

        All are finite, and so is their sum with a change of up to half the dtype's range: infinite
        weights have tests of their own.
        """
        shape = (shape,) if isinstance(shape, int) else shape
        spread = torch.randn(shape, generator=self.generator) * 3 - 3
        normal = torch.randn(shape, generator=self.generator) * torch.exp(spread)
        tiny = torch.rand(shape, generator=self.generator) < 0.05
        zero = torch.rand(shape, generator=self.generator) < 0.02
        small, largest = torch.finfo(dtype).tiny, torch.finfo(dtype).max / 4
        # The spread of magnitudes reaches beyond float16, in about one draw of a million.
        normal = normal.clamp(-largest, largest)
        return torch.where(zero, 0.0, torch.where(tiny, normal * small, normal)).to(dtype)

    def _below(self, bound: int) -> int:
        return int(torch.randint(bound, (), generator=self.generator))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> Random:
    """Inputs that differ every run; the seed is printed when the test fails."""
    seed = int(os.environ.get("ZORBA_TEST_SEED") or secrets.randbits(32))
    request.node.stash[_rng_seed] = seed
    return Random(seed)


@pytest.fixture
def generator(rng: Random) -> torch.Generator:
    """The torch generator of ``rng``; torch's global one starts from the same seed."""
    torch.manual_seed(rng.seed)
    return rng.generator


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every supported dtype."""
    kind: torch.dtype = request.param
    return kind


@pytest.fixture(params=SIZES)
def size(request: pytest.FixtureRequest) -> int:
    """Numbers of elements around the edges of blocks, tiles and vectors."""
    number: int = request.param
    return number


@pytest.fixture(params=zk.noise.DISTRIBUTIONS)
def distribution(request: pytest.FixtureRequest) -> str:
    """Every distribution."""
    name: str = request.param
    return name


@pytest.fixture(params=zk.noise.ROUNDINGS)
def rounding(request: pytest.FixtureRequest) -> str:
    """Every rounding."""
    name: str = request.param
    return name
