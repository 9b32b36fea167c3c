"""The thread pool after fork and under several callers.

A deadlock would hang a test: pytest then prints all stacks after ``faulthandler_timeout``. No clock
decides whether a test passes, for a busy machine may take any time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

import zorba_kernels as zk
from tests.kernels.bits import assert_same_bits, changed

NUMEL = 1 << 18  # 128 tiles: 8 pieces of work, so that threads are used


def work(seed: int) -> torch.Tensor:
    return zk.noise(NUMEL, seed=seed, stream=2)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """By numpy: torch's own OpenMP threads do not survive a fork."""
    return bool((a.numpy() == b.numpy()).all())


def in_child(body) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if body() else 1)
        except BaseException:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(autouse=True)
def several_threads(monkeypatch, threads):
    """The cpu backend, on threads of its own also where there is one core."""
    monkeypatch.setenv("ZORBA_BACKEND", "cpu")
    torch.set_num_threads(4)


@contextmanager
def meanwhile(body: Callable[[], object]) -> Iterator[list[None]]:
    """Calls something again and again in a thread of its own; gives a list as long as the calls."""
    calls: list[None] = []
    stop = threading.Event()

    def repeat() -> None:
        while not stop.is_set():
            body()
            calls.append(None)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield calls
    finally:
        stop.set()
        thread.join()


# Python warns that a process with threads forks, which is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@needs_fork
def test_forked_child_has_a_pool_of_its_own():
    """The child inherits the pool's memory, locked mutexes among it, but none of its threads."""
    expected = work(1)
    assert in_child(lambda: in_child(lambda: equal(work(1), expected)) == 0) == 0
    with meanwhile(lambda: work(3)) as calls:  # each fork is in the middle of a job
        for _ in range(10):
            assert in_child(lambda: equal(work(1), expected)) == 0
    assert calls
    assert_same_bits(work(1), expected)


def test_several_python_threads():
    expected = [work(seed) for seed in range(8)]

    def repeat(seed: int) -> bool:
        fine = True
        for _ in range(5):
            fine &= torch.equal(work(seed), expected[seed])
            z = zk.noise(NUMEL, seed=seed, stream=zk.noise.stream_of("w"))
            fine &= torch.equal(changed({"w": torch.zeros(NUMEL)}, seed, 1.0)["w"], z)
        return fine

    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(repeat, range(8)))


def test_one_table_in_several_threads():
    """Reads may overlap: fingerprints and passes out of place of one table."""
    weights = torch.linspace(-1, 1, NUMEL).bfloat16()
    table = zk.ParamTable({"w": weights})
    expected = zk.fingerprint(table)

    def read(seed: int) -> bool:
        out, again = torch.empty_like(weights), torch.empty_like(weights)
        for target in (out, again):
            zk.add_noise(table, zk.ParamTable({"w": target}), seed, 0.1)
        return zk.fingerprint(table) == expected and torch.equal(out, again)

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(read, range(16)))


def test_the_interpreter_runs_while_the_pool_works():
    """A pass releases the GIL: a thread of Python's counts on in the middle of one call.

    Beside a call that kept the GIL it would count once or twice, however long the call is, so a
    longer call is tried where a busy machine has let the thread count no further.
    """
    table = zk.ParamTable({"w": torch.zeros(1 << 16)})
    with meanwhile(lambda: time.sleep(0.001)) as ticks:
        for terms in (10_000, 20_000, 40_000, 80_000, 160_000):
            before = len(ticks)
            zk.add_noise_(table, [1] * terms, [0.1] * terms)
            if len(ticks) - before > 5:
                return
    pytest.fail("no thread of Python's ran during a pass")
