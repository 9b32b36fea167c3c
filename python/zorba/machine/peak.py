"""How much memory a process holds, and held at most."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
from pathlib import Path


def reset_peak_memory() -> None:
    """Starts the peak of this process anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Returns the most bytes that this process had resident since the last reset.

    Pages of mapped files count, those of libraries among them; ``PeakAnonymous`` leaves them out.
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


class PeakAnonymous:
    """Watches the anonymous memory of a process, while the ``with`` block runs (Linux).

    ``baseline`` is the number of bytes when the block began, ``peak`` the most seen since; memory
    that is held for less than a millisecond may be missed. A process that ends keeps its peak.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.baseline = self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-anonymous", daemon=True)

    def __enter__(self) -> PeakAnonymous:
        """Reads the baseline and begins to watch."""
        self.baseline = self.peak = anonymous_memory(self._pid)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stops watching."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        # A thread of this process reads, so the watched one is not disturbed. Linux updates its
        # counter in batches: it may be off by some hundred KiB.
        with contextlib.suppress(OSError):  # it has ended
            while True:
                self.peak = max(self.peak, anonymous_memory(self._pid))
                if self._stop.wait(0.001):
                    return
