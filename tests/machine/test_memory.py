"""The peak of a process's anonymous memory, watched from outside."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from zorba.machine import run_apart

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")

MIB = 1 << 20


def hold(ready: Callable[[], None], size: int) -> int:
    torch.ones(1 << 16)
    ready()
    whole = torch.ones(size // 4)
    held = whole.nbytes
    del whole
    return held + torch.ones(size // 8).nbytes


def map_file(ready: Callable[[], None], path: str) -> int:
    torch.ones(1 << 16).sum()
    ready()
    mapped = torch.from_file(path, shared=False, size=os.path.getsize(path) // 4)
    return int((mapped.max() == mapped.min()) * mapped.nbytes)


def variable(ready: Callable[[], None], name: str) -> str | None:
    ready()
    return os.environ.get(name)


def go_wrong(ready: Callable[[], None], how: str) -> None:
    if how != "forgets":
        ready()
    if how == "raises":
        raise KeyError("no such thing")
    if how == "dies":
        os.kill(os.getpid(), 9)


def test_sees_what_was_held_and_given_back() -> None:
    run = run_apart(hold, 256 * MIB)
    assert run.result == 384 * MIB
    assert abs(run.above - 256 * MIB) < 8 * MIB  # the counter lags


def test_leaves_out_mapped_files(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"\x01" * 128 * MIB)
    run = run_apart(map_file, str(tmp_path / "weights"))
    assert run.result == 128 * MIB
    assert run.above < 8 * MIB


def test_environment_is_the_other_processs_alone() -> None:
    assert run_apart(variable, "ZORBA_ANY", environment={"ZORBA_ANY": "7"}).result == "7"
    assert "ZORBA_ANY" not in os.environ


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "no such thing"),
        ("forgets", r"never called ready\(\)"),
        ("dies", "exit code -9"),
    ],
)
def test_says_what_went_wrong(how: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run_apart(go_wrong, how)
