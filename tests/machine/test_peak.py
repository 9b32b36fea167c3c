"""The peak of a process's anonymous memory, watched from outside."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from zorba.machine import PeakAnonymous, anonymous_memory, peak, run_apart

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")

MIB = 1 << 20


def hold(ready: Callable[[], None], size: int) -> int:
    """Holds ``size`` bytes, gives them back, and holds half of them."""
    torch.ones(1 << 16)
    ready()
    whole = torch.ones(size // 4)
    held = whole.nbytes
    del whole
    return held + torch.ones(size // 8).nbytes


def map_file(ready: Callable[[], None], path: str) -> int:
    """Reads all of a mapped file."""
    torch.ones(1 << 16).sum()
    ready()
    mapped = torch.from_file(path, shared=False, size=os.path.getsize(path) // 4)
    return int((mapped.max() == mapped.min()) * mapped.nbytes)


def fail(ready: Callable[[], None]) -> None:
    ready()
    raise KeyError("no such thing")


def forget(ready: Callable[[], None]) -> None:
    del ready


def variable(ready: Callable[[], None], name: str) -> str | None:
    ready()
    return os.environ.get(name)


def die(ready: Callable[[], None]) -> None:
    ready()
    os.kill(os.getpid(), 9)


def test_sees_what_was_held_and_given_back() -> None:
    size = 256 * MIB
    run = run_apart(hold, size)
    assert run.result == size + size // 2
    assert abs(run.above - size) < 8 * MIB  # the counter lags


def test_leaves_out_mapped_files(tmp_path: Path) -> None:
    size = 128 * MIB
    path = tmp_path / "weights"
    path.write_bytes(b"\x01" * size)
    run = run_apart(map_file, str(path))
    assert run.result == size
    assert run.above < 8 * MIB


def test_environment_is_the_other_processs_alone() -> None:
    assert run_apart(variable, "ZORBA_ANY", environment={"ZORBA_ANY": "7"}).result == "7"
    assert "ZORBA_ANY" not in os.environ


def test_watches_this_process_too(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = threading.Event()
    plain = peak.anonymous_memory
    monkeypatch.setattr(peak, "anonymous_memory", lambda pid: (plain(pid), looked.set())[0])
    before = anonymous_memory(os.getpid())
    with PeakAnonymous(os.getpid()) as watch:
        # Of the system itself: the allocator may have freed memory at hand that counts already.
        kept = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        kept.write(b"x" * len(kept))
        for _ in range(2):  # the first look may have begun before
            looked.clear()
            looked.wait()
        kept.close()
    assert watch.baseline >= before - 8 * MIB
    assert watch.peak - watch.baseline > 56 * MIB


@pytest.mark.parametrize(
    ("function", "message"),
    [(fail, "no such thing"), (forget, r"never called ready\(\)"), (die, "exit code -9")],
)
def test_says_what_went_wrong(function: Callable[..., None], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run_apart(function)


def test_no_such_process() -> None:
    with pytest.raises(OSError, match="No such file"), PeakAnonymous(2**22 + 1):
        pass
