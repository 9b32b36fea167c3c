"""Writing logs: one writer, for a server's rounds and an optimizer's steps."""

from __future__ import annotations

import bisect
import os
from pathlib import Path
from typing import BinaryIO

from zorba.files import sync_folder
from zorba.log.entry import LogEntry, end_frame, write_entry
from zorba.log.errors import LogError
from zorba.log.frame import salt_of
from zorba.log.header import LogHeader
from zorba.log.pattern import StepSeeds
from zorba.log.reader import Entries, scan

try:
    import fcntl
except ImportError:  # not on Windows: there nothing keeps two writers off one log
    fcntl = None  # type: ignore[assignment]


class LogFile(Entries):
    """A log that is open for appending, by this process alone.

    A torn tail, which a kill in the middle of an append leaves, is cut when the file is opened: it
    was never told to anyone. Damage anywhere else is a LogError, and the file is left as it is.

    Args:
        path: of the file.
        header: what the log must be about; a file that is not there is made with it. None opens a
            log of anything.
        durable: whether an appended entry survives a power cut, and not only the process.
        new: whether the file must not be there yet.

    Attributes:
        path: of the file.
        header: of the file.
        cut_bytes: bytes of a torn tail that were cut when the log was opened.

    Raises:
        LogError: the log is damaged, about something else, or open in another process.
    """

    def __init__(
        self,
        path: str | Path,
        header: LogHeader | None = None,
        *,
        durable: bool = True,
        new: bool = False,
    ) -> None:
        self.path = Path(path)
        self.cut_bytes = 0
        self._durable = durable
        self._file = self._open(header is not None, new)
        try:
            _lock(self._file, self.path)
            # Only who holds the lock may decide that the file is new: creation and lock are one
            # step, and of two servers that start together one fails.
            data = self._file.read()
            if header is not None and _unborn(data, header.encode()):
                data = header.encode()
                self._append(0, data, "the header", durable=True)
                sync_folder(self.path.parent)
            elif new:
                raise LogError(f"{self.path} exists: give another path, or resume it")
            self.header, self._index, size = scan(data)
            wrong = header.difference(self.header) if header else None
            if wrong:
                raise LogError(f"{self.path} is the log of {wrong}: give another path")
        except LogError as error:
            self._file.close()
            about = "" if str(self.path) in str(error) else f"{self.path}: "
            raise type(error)(f"{about}{error}") from None
        except BaseException:
            self._file.close()
            raise
        self.cut_bytes = len(data) - size
        # One StepSeeds for the whole run: it remembers the seeds that momentum refers to.
        self._seeds, self._salt = StepSeeds(self.header.run_seed), salt_of(self.header.log_id)
        self._size = size
        if self.cut_bytes:
            self._file.truncate(size)
            if durable:
                self.sync()

    def _open(self, create: bool, new: bool) -> BinaryIO:
        if not create:
            if not self.path.exists():
                raise LogError(f"there is no log at {self.path}")
            return self.path.open("r+b", buffering=0)
        # Asked here already, so that a refusal makes no folder; decided again under the lock.
        if new and self.path.exists() and self.path.stat().st_size:
            raise LogError(f"{self.path} exists: give another path, or resume it")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # No O_EXCL: who comes second must meet the lock, and a file that a crash left empty is new.
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        return os.fdopen(descriptor, "r+b", buffering=0)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._size

    def append(self, entry: LogEntry) -> None:
        """Writes an entry; with ``durable`` it survives a power cut when this returns.

        Raises:
            LogError: it is not the next one, does not fit the log, or could not be written (a full
                disk); the log then is as before.
        """
        self._check_next(entry.number)
        if entry.terms.coefs.shape[0] != self.header.num_groups:
            raise LogError(
                f"coefs of {entry.terms.coefs.shape[0]} groups in a log of {self.header.num_groups}"
            )
        data = write_entry(entry, self._seeds, self._salt)
        # On disk before the index knows it, and before the caller tells anybody.
        self._append(self.size, data, f"entry {entry.number}", self._durable)
        self._size += len(data)
        self._index.note(entry, self.size)

    def finish(self, fingerprint: int) -> None:
        """Ends the log with the fingerprint of the weights as they are now, and closes it."""
        self._check_next(self.last + 1)
        # Durable in any case: the end is what makes a trajectory verifiable.
        data = end_frame(self.last + 1, fingerprint, self._salt)
        self._append(self.size, data, "the end", durable=True)
        self._size += len(data)
        self._index.end = fingerprint
        self.close()

    def rewind(self, number: int) -> None:
        """Cuts the entries from a number on, and the end: the run will make them again.

        Raises:
            LogError: the log ends before that, or starts later; it is left as it is.
        """
        if not self.first <= number <= self.last + 1:
            raise LogError(
                f"the trajectory has steps {self.first} to {self.last}: it cannot go on with step "
                f"{number}"
            )
        # Cut, not overwritten later: a crash now must not leave old steps behind new ones.
        self._index.cut(number - self.first)
        self._size = self._index.ends[-1]
        self._file.truncate(self.size)

    def frames(self, first: int, max_bytes: int) -> tuple[int, bytes]:
        """Returns entries as they lie in the file, for ``decode_entries``, which checks them.

        Args:
            first: number of the first one; the one after the last gives none.
            max_bytes: take no more than fit.

        Returns:
            How many entries they are, and their bytes.
        """
        # Whole frames only, found in the index: nothing is decoded for a client that lacks a
        # thousand rounds.
        stop = self._check_range(first, None) - self.first + 1
        start = first - self.first
        begin = self._index.ends[start]
        last = bisect.bisect_right(self._index.ends, begin + max_bytes, start + 1, stop + 1) - 1
        return last - start, self._read(begin, self._index.ends[last] - begin)

    def sync(self) -> None:
        """Makes what was appended survive a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; another process may then open it."""
        self._file.close()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._file.closed

    def __enter__(self) -> LogFile:
        """Returns the log itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        self.close()

    def _check_next(self, number: int) -> None:
        if self.closed or self._index.end is not None:
            raise LogError(f"{self.path} is finished: entry {number} cannot be written")
        if number != self.last + 1:
            raise LogError(
                f"entry {number} came after entry {self.last}; {self.path} must have every one, "
                "skipped ones too"
            )

    def _append(self, size: int, data: bytes, what: str, durable: bool) -> None:
        """Writes bytes behind the first ``size`` ones, all of them or none."""
        # Ctrl-C may come between write and note: the file is then shortened to what the index has.
        try:
            self._file.seek(size)
            # Unbuffered: one system call, so what a kill cuts short is one frame.
            if self._file.write(data) != len(data):
                raise OSError("it was written in part")
            if durable:
                os.fsync(self._file.fileno())
        except BaseException as error:
            self._file.truncate(size)
            if isinstance(error, OSError):
                raise LogError(f"{what} was not written to {self.path}: {error}") from error
            raise

    def _read(self, offset: int, count: int) -> bytes:
        # Not seek and read: appends use the position of the file.
        parts = []
        while count > 0 and (part := os.pread(self._file.fileno(), count, offset)):
            parts.append(part)
            count, offset = count - len(part), offset + len(part)
        return b"".join(parts)


def _unborn(data: bytes, header: bytes) -> bool:
    """Whether a crash cut the header short, so that nobody was ever told anything of this log."""
    return len(data) < len(header) and header.startswith(data)


def _lock(file: BinaryIO, path: Path) -> None:
    if fcntl is None:
        return
    try:
        # flock ends with the process, however it ends: no stale lock survives a kill.
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise LogError(
            f"{path} is open in another process, another server or run: two must not write one log"
        ) from None
