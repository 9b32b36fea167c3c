"""Options and fixtures shared by all suites.

``rng`` makes inputs from a seed that is new every run and printed when the test fails;
``ZORBA_TEST_SEED`` gives it back.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") != "0"
"""Whether this process serves CPU tensors with Triton's interpreter: ``make test-interpret``."""

if INTERPRETED:
    from tests.kernels import interpreter

    interpreter.correct()

_rng_seed = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --server, for one backend and instruction set, and --full, for every combination."""
    parser.addoption("--server", help="run backend tests on this one only, for example cpu-avx2")
    parser.addoption(
        "--full", action="store_true", help="every combination, not just every pair of values"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Returns one more than there are cores: one waits for a deployed federation for minutes."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_configure() -> None:
    """Shares the cores among the processes of pytest-xdist."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    # More threads than cores wait for each other: torch's spin while they do.
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        gpu = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


def pytest_make_parametrize_id(val: object) -> str | None:
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed and _rng_seed in item.stash:
        said = f"repeat with ZORBA_TEST_SEED={item.stash[_rng_seed]}"
        report.sections.append(("random inputs", said))
    return report


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether every combination was asked for, and large samples: ``--full``."""
    return bool(request.config.getoption("--full"))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- Random inputs -------------------------------------------------------------------------------


class Random:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, bits: int) -> int:
        """Uniform below 2**bits, for up to 64 bits."""
        low, high = torch.randint(1 << 32, (2,), generator=self.generator).tolist()
        return (high << 32 | low) >> (64 - bits)

    def integers(self, count: int, bits: int = 64) -> list[int]:
        return [self.integer(bits) for _ in range(count)]

    def key(self) -> dict[str, int]:
        """Arguments that tell one noise from others."""
        return {"seed": self.integer(64), "stream": self.integer(64), "sample": self.integer(31)}

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


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> Random:
    """Inputs that differ every run; the seed is printed when the test fails."""
    seed = int(os.environ.get("ZORBA_TEST_SEED") or secrets.randbits(32))
    request.node.stash[_rng_seed] = seed
    return Random(seed)


@pytest.fixture
def generator(rng: Random) -> torch.Generator:
    torch.manual_seed(rng.seed)
    return rng.generator
