"""How much memory a process holds and held at most: this one, another, or one for a call."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import resource
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
"""Environment in which glibc gives freed tensors back to the system. Left to itself it keeps freed
pieces between live ones, from some MiB to hundreds of them, by chance."""


def reset_peak_memory() -> None:
    """Starts the peak of this process anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Returns the most bytes that this process had resident since the last reset.

    Pages of mapped files count, those of libraries among them; ``run_apart`` leaves them out.
    """
    # Linux's own line first: getrusage's figure cannot be reset.
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def anonymous_memory(pid: int) -> int:
    """Returns the bytes of anonymous memory that a process has resident now (Linux).

    That is memory of no file: heap, stacks, tensors, but no weights that are mapped from a file,
    whose pages the system can drop. It is an ``OSError`` if there is no such process.
    """
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    # Resident pages that are not shared with a file or another process; none while it ends.
    pages = int(fields[1]) - int(fields[2]) if fields else 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Apart:
    """The result of a call in a separate process, and its memory."""

    result: Any
    baseline: int  # bytes of anonymous memory when the function said that it was ready
    peak: int  # the most seen since; what is held for less than a millisecond may be missed
    device_peak: int  # the most bytes that torch's allocator held on a GPU since; 0 without one

    @property
    def above(self) -> int:
        """Bytes of anonymous memory above the baseline."""
        return self.peak - self.baseline


def run_apart(
    function: Callable[..., Any], *args: Any, environment: Mapping[str, str] | None = None
) -> Apart:
    """Calls ``function(ready, *args)`` in a fresh process and measures its memory (Linux).

    The function imports what it needs and then calls ``ready()``, once: the baseline is read there.
    Function, arguments and result are pickled, and a script that calls this needs the usual
    ``if __name__ == "__main__"``, as for ``multiprocessing``. The process has the variables of
    ``environment`` besides those of this one. RuntimeError: the function raised (the message has
    its traceback), never called ``ready``, or its process died.
    """
    # Spawned: a forked process would share, and so not count, the pages of this one.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, function, args), daemon=True)
    # glibc reads its variables at the start of a process, which inherits them from this one.
    before = dict(os.environ)
    os.environ.update(environment or {})
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    theirs.close()  # or the end of the process would not be noticed
    try:
        _receive(ours, process, "ready")
        pid = int(process.pid or 0)
        baseline = peak = anonymous_memory(pid)
        ours.send("go")  # it waits while the baseline is read
        # Read from here, so that the call is not disturbed. Linux updates its counter in batches:
        # it may be off by some hundred KiB.
        while not ours.poll(0.001):
            peak = max(peak, anonymous_memory(pid))
        result, device_peak = _receive(ours, process, "done")
        return Apart(result, baseline, peak, device_peak)
    finally:
        ours.close()
        process.join(10)
        process.kill()  # if it still lives
        process.join()


def _receive(connection: Connection, process: Any, wanted: str) -> Any:
    try:
        kind, value = connection.recv()
    except EOFError:  # it has ended without a word: killed, or a crash in compiled code
        process.join(10)
        raise RuntimeError(
            f"the process of the call ended with exit code {process.exitcode} (negative: a signal; "
            "-9 is often the system, out of memory)"
        ) from None
    if kind == "error":
        raise RuntimeError(f"the call in a process of its own failed:\n{value}")
    if kind != wanted:
        raise RuntimeError("the function never called ready(): there is no baseline")
    return value


def _serve(connection: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    def ready() -> None:
        # Garbage and free memory of the imports would be reused by the call, and so not be seen.
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # glibc only
            ctypes.CDLL(None).malloc_trim(0)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        connection.send(("ready", None))
        connection.recv()

    try:
        result = function(ready, *args)
        device_peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        connection.send(("done", (result, device_peak)))
    except BaseException:
        connection.send(("error", traceback.format_exc()))
