"""Reading logs: one reader, which checks every byte."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from zorba.log.entry import LogEntry, read_end, read_entry
from zorba.log.errors import DamagedLogError, LogError
from zorba.log.frame import END, frame_follows, salt_of, unframe
from zorba.log.header import LogHeader, decode_header
from zorba.log.pattern import StepSeeds


@dataclass
class Index:
    """Where the entries of a log lie, and what they tell of the weights.

    Attributes:
        ends: [i] is where the header (i = 0) or the i-th entry ends.
        states: [i] counts the entries up to the i-th that changed weights.
        fingerprints: of the weights by state, where it is known.
        end: fingerprint of a finished run, or None.
    """

    # Offsets alone stay in memory, 16 bytes an entry: a server of 10,000 rounds reads entries from
    # the file when a client lacks them.
    ends: list[int]
    states: list[int] = field(default_factory=lambda: [0])
    fingerprints: dict[int, int] = field(default_factory=dict)
    end: int | None = None

    @property
    def count(self) -> int:
        """Entries of the log."""
        return len(self.ends) - 1

    def note(self, entry: LogEntry, end: int) -> None:
        """Takes in an entry that ends at this offset."""
        state = self.states[-1]
        if entry.base is not None:
            # The base holds as far back as no entry changed a weight.
            self.fingerprints.setdefault(state, entry.base)
        self.states.append(state if entry.empty else state + 1)
        self.ends.append(end)

    def cut(self, count: int) -> None:
        """Forgets all but the first entries."""
        # Fingerprints of later states are of weights that the run will make anew.
        del self.ends[count + 1 :], self.states[count + 1 :]
        self.fingerprints = {s: f for s, f in self.fingerprints.items() if s <= self.states[-1]}
        self.end = None


def scan(data: bytes) -> tuple[LogHeader, Index, int]:
    """Checks all bytes of a file.

    Returns:
        Header, index, and where the last whole frame ends. What lies behind it is a torn tail: a
        crash cuts a frame short, and no whole frame follows one that was cut. Damage anywhere else
        raises LogError, so that nothing whole is ever cut off.
    """
    # A view: slices of a log of a gigabyte must not be copies.
    view = memoryview(data)
    header, at = decode_header(view)
    index = Index([at], fingerprints={0: header.identity.start})
    salt, seeds = salt_of(header.log_id), StepSeeds(header.run_seed)
    while at < len(view):
        number = header.first + index.count
        try:
            found = unframe(view, at, salt)
        except DamagedLogError as error:
            # A torn frame is the last thing that was written. Whole frames behind it mean that the
            # disk or a person changed the file, and cutting would lose what was promised to last.
            if frame_follows(view, at, salt):
                raise LogError(
                    f"offset {at}, entry {number}: {error}. Entries after it are whole, so this is "
                    "no torn tail: restore the file from a copy"
                ) from None
            break
        try:
            if index.end is not None:
                raise LogError("an entry after the end")
            if found.number != number:
                raise LogError(f"it is entry {found.number}, expected {number}")
            # Every entry is decoded here, so that a log which opens can be applied to its end.
            if found.kind == END:
                index.end = read_end(found)
            else:
                index.note(read_entry(found, header.num_groups, seeds), found.end)
        except LogError as error:  # undamaged: somebody wrote it like that
            raise LogError(f"offset {at}, entry {number}: {error}") from None
        at = found.end
    return header, index, at


class Entries(ABC):
    """What a log that is read and one that is written have in common."""

    header: LogHeader
    _index: Index

    @property
    def first(self) -> int:
        """Number of the first entry, whether it is there or not."""
        return self.header.first

    @property
    def last(self) -> int:
        """Number of the last entry; ``first - 1`` where there is none."""
        return self.first + self._index.count - 1

    @property
    def num_steps(self) -> int:
        """Entries that changed weights."""
        return self._index.states[-1]

    @property
    def num_skipped(self) -> int:
        """Entries that left the weights alone."""
        return self._index.count - self.num_steps

    @property
    def fingerprint(self) -> int | None:
        """Fingerprint of the weights at the end of a finished run; else None."""
        return self._index.end

    def fingerprint_after(self, number: int) -> int | None:
        """Returns the fingerprint of the weights after an entry, or None where none tells it."""
        return self._index.fingerprints.get(self._index.states[number + 1 - self.first])

    def entry(self, number: int) -> LogEntry:
        """Returns one entry."""
        return next(self.entries(number, number))

    def entries(self, first: int | None = None, last: int | None = None) -> Iterator[LogEntry]:
        """Yields entries, empty ones too, in order.

        Args:
            first: number of the first one; that of the log by default.
            last: number of the last one, at least ``first - 1``; that of the log by default.

        Raises:
            LogError: numbers that are not in the log, or an entry that was damaged since.
        """
        # Checked as a whole before the first one is read: half a range would be half an update.
        begin = self.first if first is None else first
        seeds, salt = StepSeeds(self.header.run_seed), salt_of(self.header.log_id)
        for number in range(begin, self._check_range(begin, last) + 1):
            at = number - self.first
            start, end = self._index.ends[at], self._index.ends[at + 1]
            try:
                # Checked again: the file may have been damaged since it was opened.
                found = unframe(memoryview(self._read(start, end - start)), 0, salt)
                yield read_entry(found, self.header.num_groups, seeds)
            except LogError as error:
                raise LogError(f"offset {start}, entry {number}: {error}") from None

    def _check_range(self, first: int, last: int | None) -> int:
        end = self.last if last is None else last
        if not self.first <= first <= end + 1 or end > self.last:
            raise LogError(
                f"entries {first} to {end} are not in a log of {self.first} to {self.last}"
            )
        return end

    @abstractmethod
    def _read(self, offset: int, count: int) -> bytes:
        """Returns bytes of the file."""


class Log(Entries):
    """A file that was read and checked as a whole. Iterating over its entries decodes them.

    Attributes:
        header: what it starts from.
        torn_bytes: bytes of a torn tail, which a crash left and which are ignored.
        size: bytes of the file without that tail.
    """

    def __init__(self, data: bytes) -> None:
        """``read`` takes a path instead of bytes."""
        self.header, self._index, self.size = scan(data)
        self.torn_bytes = len(data) - self.size
        self._data = data

    @staticmethod
    def read(path: str | Path) -> Log:
        """Reads a file and checks every byte of it; the file is not modified.

        Raises:
            LogError: it is no log, of another format or noise version, or damaged elsewhere than
                at its end.
        """
        try:
            return Log(Path(path).read_bytes())
        except OSError as error:
            raise LogError(f"{path} cannot be read: {error}") from None
        except LogError as error:
            raise type(error)(f"{path}: {error}") from None

    def _read(self, offset: int, count: int) -> bytes:
        return self._data[offset : offset + count]
