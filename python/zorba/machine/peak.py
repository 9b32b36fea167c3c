"""How much memory a process holds, and held at most."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")


def reset_peak_memory() -> None:
    """Starts the peak of this process anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Returns the most bytes that this process had resident since the last reset.

    Pages of mapped files count, those of libraries among them; ``PeakAnonymous`` leaves them out.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = _STATUS.read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def anonymous_memory(pid: int) -> int:
    """Returns the bytes of anonymous memory that a process has resident now (Linux).

    Anonymous is what belongs to no file: heap, stacks, tensors. Weights that are mapped from a file
    are not, since the system can drop their pages and read them again.

    Raises:
        OSError: there is no such process, or no /proc.
    """
    return _pages(Path(f"/proc/{pid}/statm").read_bytes()) * os.sysconf("SC_PAGE_SIZE")


class PeakAnonymous:
    """Watches the anonymous memory of another process, while the ``with`` block runs.

    A thread of this process reads ``/proc/PID/statm`` every ``interval`` seconds, so the watched
    process is not disturbed; what is held for less than that may be missed. The kernel's own
    counter lags behind by up to some hundred KiB.

    Args:
        pid: of the process; one that ends while it is watched keeps its peak.
        interval: seconds between two looks.

    Attributes:
        baseline: bytes when the block began.
        peak: the most bytes seen since.

    Raises:
        OSError: on entering, if there is no such process, or no /proc (it needs Linux).
    """

    def __init__(self, pid: int, interval: float = 0.001) -> None:
        self.pid = pid
        self.interval = interval
        self.baseline = self.peak = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def above(self) -> int:
        """Bytes of the peak above the baseline."""
        return self.peak - self.baseline

    def __enter__(self) -> PeakAnonymous:
        """Reads the baseline and begins to watch."""
        self.baseline = self.peak = anonymous_memory(self.pid)
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, name="peak-anonymous", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops watching."""
        assert self._thread is not None
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        with contextlib.suppress(OSError):  # the process has ended
            file = os.open(f"/proc/{self.pid}/statm", os.O_RDONLY)
            try:
                while True:
                    self.peak = max(self.peak, _pages(os.pread(file, 256, 0)) * page)
                    if self._stop.wait(self.interval):
                        return
            finally:
                os.close(file)


def _pages(statm: bytes) -> int:
    """Resident pages that are not shared (with a file or another process)."""
    fields = statm.split()
    return int(fields[1]) - int(fields[2]) if fields else 0
