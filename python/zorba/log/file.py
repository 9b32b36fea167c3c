"""Files of logs: ``Log`` reads one and checks every byte, ``LogFile`` appends to it."""

from __future__ import annotations

import bisect
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from zorba.files import sync_folder
from zorba.log.binary import END, U64, DamagedLogError, LogError, frame, frame_follows, unframe
from zorba.log.entry import LogEntry, encode_entry, read_entry
from zorba.log.header import LogHeader, decode_header


class Log:
    """A file that was read and checked as a whole; entries are decoded when they are asked for."""

    def __init__(self, data: bytes) -> None:
        # A view: slices of a log of a gigabyte must not be copies.
        view = memoryview(data)
        self.header, at = decode_header(view)
        self.first = self.header.first  # number of the first entry, there or not
        self.fingerprint: int | None = None  # of the weights at the end of a finished run
        self._data = data
        # Offsets alone stay in memory, 16 bytes an entry: a server of 10,000 rounds reads entries
        # from the file when a client lacks them.
        self._ends = [at]  # [i] is where the header (i = 0) or the i-th entry ends
        self._states = [0]  # [i] counts the entries up to the i-th that changed weights
        self._known = {0: self.header.identity.start}  # fingerprints by state
        while at < len(view):
            number = self.last + 1
            try:
                found = unframe(view, at, self.header.log_id)
                if self.fingerprint is not None:
                    raise LogError("an entry after the end")
                if found.number != number:
                    raise LogError(f"it is entry {found.number}, expected {number}")
                # Every entry is decoded here, so that a log which opens can be applied to its end.
                if found.kind == END:
                    if len(found.body) != U64.size:
                        raise LogError(f"the end has {len(found.body)} bytes")
                    (self.fingerprint,) = U64.unpack(found.body)
                else:
                    entry = read_entry(found, self.header.num_groups, self.header.run_seed)
                    self._note(entry, found.end)
            except DamagedLogError as error:
                # A torn frame is the last that was written. Whole ones behind it mean that the disk
                # or a person changed the file, and cutting would lose what was promised to last.
                if not frame_follows(view, at, self.header.log_id):
                    break
                raise LogError(
                    f"offset {at}, entry {number}: {error}. Entries after it are whole, so this is "
                    "no torn tail: restore the file from a copy"
                ) from None
            except LogError as error:  # undamaged: somebody wrote it like that
                raise LogError(f"offset {at}, entry {number}: {error}") from None
            at = found.end
        # Bytes without a torn tail, and of one: a crash left it, and it is ignored.
        self.size, self.torn_bytes = at, len(view) - at

    @staticmethod
    def read(path: str | Path) -> Log:
        """Reads a file, or raises LogError where it is no log, or damaged before its end."""
        try:
            return Log(Path(path).read_bytes())
        except OSError as error:
            raise LogError(f"{path} cannot be read: {error}") from None
        except LogError as error:
            raise type(error)(f"{path}: {error}") from None

    @property
    def last(self) -> int:
        """Number of the last entry; ``first - 1`` where there is none."""
        return self.first + len(self._ends) - 2

    @property
    def num_steps(self) -> int:
        """Entries that changed weights."""
        return self._states[-1]

    @property
    def num_skipped(self) -> int:
        """Entries that left the weights alone."""
        return self.last + 1 - self.first - self.num_steps

    def fingerprint_after(self, number: int) -> int | None:
        """Returns the fingerprint of the weights after an entry, or None where none tells it."""
        if number == self.last and self.fingerprint is not None:
            return self.fingerprint
        return self._known.get(self._states[number + 1 - self.first])

    def entry(self, number: int) -> LogEntry:
        """Returns one entry."""
        return next(self.entries(number, number))

    def entries(self, first: int | None = None, last: int | None = None) -> Iterator[LogEntry]:
        """Yields entries, empty ones too, from number ``first`` to ``last``; all by default.

        LogError: numbers that are not in the log, or an entry that was damaged since.
        """
        # Checked as a whole before the first one is read: half a range would be half an update.
        begin, end = self._range(self.first if first is None else first, last)
        for at in range(begin, end):
            start = self._ends[at]
            try:
                # Checked again: the file may have been damaged since it was opened.
                data = memoryview(self._read(start, self._ends[at + 1] - start))
                found = unframe(data, 0, self.header.log_id)
                yield read_entry(found, self.header.num_groups, self.header.run_seed)
            except LogError as error:
                raise LogError(f"offset {start}, entry {self.first + at}: {error}") from None

    def _range(self, first: int, last: int | None) -> tuple[int, int]:
        """Returns places in the file: of the first entry, and of the one behind the last."""
        end = self.last if last is None else last
        if not self.first <= first <= end + 1 <= self.last + 1:
            mine = f"{self.first} to {self.last}"
            raise LogError(f"entries {first} to {end} are not in a log of {mine}")
        return first - self.first, end + 1 - self.first

    def _read(self, offset: int, count: int) -> bytes:
        return self._data[offset : offset + count]

    def _note(self, entry: LogEntry, end: int) -> None:
        """Takes in an entry that ends at this offset."""
        state = self._states[-1]
        if entry.base is not None:
            # The base holds as far back as no entry changed a weight.
            self._known.setdefault(state, entry.base)
        self._states.append(state if entry.empty else state + 1)
        self._ends.append(end)


class LogFile(Log):
    """A log that is open for appending, by this process alone.

    A torn tail, which a kill in the middle of an append leaves, is cut when the file is opened: it
    was never told to anyone. Damage anywhere else is a LogError, and the file is left as it is.

    Args:
        path: of the file.
        header: what the log must be about; a file that is not there is made with it. None opens a
            log of anything.
        durable: whether an appended entry survives a power cut, and not only the process.

    Raises:
        LogError: the log is damaged, about something else, or open in another process.
    """

    def __init__(
        self, path: str | Path, header: LogHeader | None = None, *, durable: bool = True
    ) -> None:
        self.path, self.size, self._durable = Path(path), 0, durable
        if header is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        elif not self.path.exists():
            raise LogError(f"there is no log at {path}")
        # No O_EXCL: who comes second must meet the lock, and a file that a crash left empty is new.
        flags = os.O_RDWR if header is None else os.O_RDWR | os.O_CREAT
        # Unbuffered: an append is one system call, so what a kill cuts short is one frame.
        self._file = os.fdopen(os.open(self.path, flags, 0o666), "r+b", buffering=0)
        try:
            super().__init__(self._claim(b"" if header is None else header.encode()))
            self._data = b""  # from now on, entries are read from the file
            if header is not None and (wrong := header.difference(self.header)):
                raise LogError(f"it is the log of {wrong}: give another path")
            if self.torn_bytes:
                self._file.truncate(self.size)
                if durable:
                    self.sync()
        except BaseException as error:
            self.close()
            if isinstance(error, LogError):
                raise type(error)(f"{path}: {error}") from None
            raise

    def _claim(self, header: bytes) -> bytes:
        """Locks the file, makes it where it is new, and returns its bytes."""
        try:
            # flock ends with the process, however it ends: no stale lock survives a kill.
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            told = "open in another process, another server or run: two must not write one log"
            raise LogError(told) from None
        # Only who holds the lock may decide that the file is new: creation and lock are one step,
        # and of two servers that start together one fails.
        data = self._file.read()
        if len(data) >= len(header) or not header.startswith(data):
            return data
        # New, or its header was cut by a crash: before anybody was told anything of this log.
        self._append(header, "the header", durable=True)
        sync_folder(self.path.parent)
        return header

    def append(self, entry: LogEntry) -> None:
        """Writes an entry; with ``durable`` it survives a power cut when this returns.

        LogError, and the log as before: it is not the next one, does not fit, or the disk is full.
        """
        self._check_next(entry.number)
        groups, header = entry.terms.coefs.shape[0], self.header
        if groups != header.num_groups:
            raise LogError(f"coefs of {groups} groups in a log of {header.num_groups}")
        data = encode_entry(entry, header.log_id, header.run_seed)
        # On disk before the index knows it, and before the caller tells anybody.
        self._append(data, f"entry {entry.number}", self._durable)
        self._note(entry, self.size)

    def finish(self, fingerprint: int) -> None:
        """Ends the log with the fingerprint of the weights as they are now, and closes it."""
        self._check_next(self.last + 1)
        data = frame(END, self.last + 1, U64.pack(fingerprint), self.header.log_id)
        # Durable in any case: the end is what makes a trajectory verifiable.
        self._append(data, "the end", durable=True)
        self.fingerprint = fingerprint
        self.close()

    def rewind(self, number: int) -> None:
        """Cuts the entries from a number on, and the end: the run will make them again."""
        if not self.first <= number <= self.last + 1:
            mine = f"{self.first} to {self.last}"
            raise LogError(f"the trajectory has steps {mine}: it cannot go on with step {number}")
        # Cut, not overwritten later: a crash now must not leave old steps behind new ones.
        at = number - self.first
        self.size, self.fingerprint = self._ends[at], None
        self._file.truncate(self.size)
        del self._ends[at + 1 :], self._states[at + 1 :]
        # Fingerprints of later states are of weights that the run will make anew.
        self._known = {s: f for s, f in self._known.items() if s <= self.num_steps}

    def frames(self, first: int, max_bytes: int) -> tuple[int, bytes]:
        """Returns how many entries from a number on fit, and their bytes for ``decode_entries``."""
        # Whole frames, found by their ends: nothing is decoded for who lacks a thousand rounds.
        begin, stop = self._range(first, None)
        start = self._ends[begin]
        end = bisect.bisect_right(self._ends, start + max_bytes, begin + 1, stop + 1) - 1
        return end - begin, self._read(start, self._ends[end] - start)

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
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_next(self, number: int) -> None:
        if self.closed or self.fingerprint is not None:
            raise LogError(f"{self.path} is finished: entry {number} cannot be written")
        if number != self.last + 1:
            told = f"entry {number} came after entry {self.last}"
            raise LogError(f"{told}; {self.path} must have every one, skipped ones too")

    def _append(self, data: bytes, what: str, durable: bool) -> None:
        """Writes bytes behind the others, all of them or none."""
        try:
            self._file.seek(self.size)
            if self._file.write(data) != len(data):
                raise OSError("it was written in part")
            if durable:
                self.sync()
        except BaseException as error:  # Ctrl-C, too
            self._file.truncate(self.size)
            if isinstance(error, OSError):
                raise LogError(f"{what} was not written to {self.path}: {error}") from error
            raise
        self.size += len(data)

    def _read(self, offset: int, count: int) -> bytes:
        # Not seek and read: appends use the position of the file.
        return os.pread(self._file.fileno(), count, offset)
