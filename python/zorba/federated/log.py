"""RoundLog: the append-only file that is the server's whole state."""

from __future__ import annotations

import bisect
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from zorba.federated.codec import decode_choice, pack_checked
from zorba.federated.entry import (
    RECORD_HEAD_BYTES,
    RECORD_MAGIC,
    LogEntry,
    decode_entry,
    read_head,
)
from zorba.federated.errors import DamagedError, LogError, MessageError
from zorba.federated.identity import ModelIdentity
from zorba.files import write_whole
from zorba.log.binary import DISTRIBUTION_CODES, ROUNDING_CODES
from zorba_kernels.noise import NOISE_VERSION, Distribution, Rounding

try:
    import fcntl
except ImportError:  # not on Windows: there nothing keeps two servers off one log
    fcntl = None  # type: ignore[assignment]

LOG_MAGIC = b"ZORBALOG"
LOG_SCHEMA = 1

# magic, schema, noise version, distribution, rounding, 0, blocks, job, origin, start, layout,
# weights
_HEADER = struct.Struct("<8sHBBBBHQQQQQ")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CRC.size


@dataclass(frozen=True)
class LogHeader:
    """What all entries of a log are about.

    Attributes:
        job: uint64.
        identity: of the model at theta_0.
        distribution: of the noise.
        rounding: of 16-bit weights.
        noise_version: of the noise contract.
    """

    job: int
    identity: ModelIdentity
    distribution: Distribution
    rounding: Rounding
    noise_version: int = NOISE_VERSION

    def encode(self) -> bytes:
        """Returns the header's bytes."""
        data = pack_checked(
            _HEADER,
            "log header",
            LOG_MAGIC,
            LOG_SCHEMA,
            self.noise_version,
            DISTRIBUTION_CODES[self.distribution],
            ROUNDING_CODES[self.rounding],
            0,
            self.identity.num_blocks,
            self.job,
            self.identity.origin,
            self.identity.start,
            self.identity.layout,
            self.identity.num_weights,
        )
        return data + _CRC.pack(zlib.crc32(data))

    @staticmethod
    def decode(data: bytes) -> LogHeader:
        """Returns the header of a log's first bytes, or raises LogError."""
        if len(data) < HEADER_BYTES:
            raise LogError(
                f"offset 0: a log starts with {HEADER_BYTES} bytes of header, {len(data)} are there"
            )
        fields = _HEADER.unpack_from(data)
        magic, schema, noise, law, rounding, zero, blocks, job, origin, start, layout, weights = (
            fields
        )
        if magic != LOG_MAGIC:
            raise LogError(f"offset 0: this is no log: it starts with {magic!r}")
        if _CRC.unpack_from(data, _HEADER.size)[0] != zlib.crc32(data[: _HEADER.size]):
            raise LogError("offset 0: the log's header is damaged: its CRC does not match")
        if schema != LOG_SCHEMA or zero != 0:
            raise LogError(f"offset 8: log schema {schema}, this package reads {LOG_SCHEMA}")
        if noise != NOISE_VERSION:
            raise LogError(
                f"offset 10: the log is of noise version {noise}, this package makes version "
                f"{NOISE_VERSION}: replay it with the package that wrote it"
            )
        try:
            return LogHeader(
                job=job,
                identity=ModelIdentity(origin, start, layout, weights, blocks),
                distribution=decode_choice(DISTRIBUTION_CODES, law, "distribution"),
                rounding=decode_choice(ROUNDING_CODES, rounding, "rounding"),
            )
        except MessageError as error:
            raise LogError(f"offset 11: {error}") from None

    def difference(self, other: LogHeader) -> str | None:
        """Returns a sentence on the first thing in which ``other`` differs, or None."""
        for what in ("job", "distribution", "rounding"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                return f"another {what}: {theirs}, expected {mine}"
        return self.identity.difference(other.identity)


class RoundLog:
    """A log that is open for appending; entry t is of round t.

    The file must end with a whole entry. A torn tail, which a kill in the middle of an append
    leaves, is cut when the log is opened and told by ``cut_bytes``; it was never told to anyone.
    Damage anywhere else is a LogError, and the file is left as it is.

    Args:
        path: of the file.
        header: what the log must be about; a file that does not exist is made with it. None opens
            an existing log of anything.

    Raises:
        LogError: the log is damaged, about something else, or another process has it open.
    """

    def __init__(self, path: str | Path, header: LogHeader | None = None) -> None:
        self.path = Path(path)
        self.cut_bytes = 0
        """Bytes of a torn tail that were cut when the log was opened."""
        if not self.path.exists():
            if header is None:
                raise LogError(f"there is no log at {self.path}")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            data = header.encode()
            write_whole(self.path, data)
        self._file: BinaryIO = self.path.open("r+b", buffering=0)
        try:
            _lock(self._file, self.path)
            self.header = LogHeader.decode(self._read(0, HEADER_BYTES))
            wrong = header.difference(self.header) if header else None
            if wrong:
                raise LogError(f"{self.path} is the log of {wrong}: give another path")
            self._ends = [HEADER_BYTES]  # [t] is where entry t ends
            self._states = [0]  # [t] counts the entries up to t that changed the weights
            self._fingerprints = {0: self.header.identity.start}  # by state, where it is known
            self._scan()
        except BaseException:
            self._file.close()
            raise

    @property
    def last_round(self) -> int:
        """Round of the last entry; 0 for a log without entries."""
        return len(self._ends) - 1

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._ends[-1]

    def append(self, entry: LogEntry) -> None:
        """Writes an entry; when this returns it survives a power cut.

        Raises:
            LogError: it is not the next round's, or could not be written (a full disk); the log
                then is as before.
        """
        if entry.round != self.last_round + 1:
            raise LogError(f"entry of round {entry.round} after round {self.last_round}")
        if entry.num_blocks != self.header.identity.num_blocks:
            raise LogError(
                f"entry of {entry.num_blocks} blocks in a log of {self.header.identity.num_blocks}"
            )
        record = entry.record
        try:
            self._file.seek(self.size)
            if self._file.write(record) != len(record):
                raise OSError("the record was written in part")
            os.fsync(self._file.fileno())
        except BaseException as error:
            self._file.truncate(self.size)
            if isinstance(error, OSError):
                raise LogError(
                    f"round {entry.round} was not written to the log: {error}"
                ) from error
            raise
        self._note(entry, self.size + len(record))

    def fingerprint_after(self, round_number: int) -> int | None:
        """Returns the fingerprint of the replicas after a round, or None where no entry tells it.

        An entry tells the one before it, which holds as far back as no entry changed a weight.
        """
        return self._fingerprints.get(self._states[round_number])

    def entry(self, round_number: int) -> LogEntry:
        """Returns the entry of a round."""
        return next(self.entries(round_number, round_number))

    def entries(self, first: int, last: int | None = None) -> Iterator[LogEntry]:
        """Yields the entries of rounds ``first`` to ``last`` (None: to the end of the log).

        Args:
            first: from 1.
            last: at least ``first - 1``, which yields none.

        Raises:
            LogError: rounds that are not in the log, or a record that was damaged since.
        """
        for round_number in range(first, self._check_range(first, last) + 1):
            begin, stop = self._ends[round_number - 1], self._ends[round_number]
            try:
                yield decode_entry(self._read(begin, stop - begin))
            except MessageError as error:
                raise LogError(f"offset {begin}, round {round_number}: {error}") from None

    def records(self, first: int, max_bytes: int) -> tuple[int, bytes]:
        """Returns the bytes of entries as they lie in the file; whoever decodes them checks them.

        Args:
            first: round of the first one, from 1; the round after the last makes none.
            max_bytes: take no more than fit.

        Returns:
            How many entries they are, and their bytes.

        Raises:
            LogError: the round is not in the log.
        """
        end = self._check_range(first, None)
        begin = self._ends[first - 1]
        last = bisect.bisect_right(self._ends, begin + max_bytes, first, end + 1) - 1
        return last + 1 - first, self._read(begin, self._ends[last] - begin)

    def close(self) -> None:
        """Closes the file; another server may then open it."""
        self._file.close()

    def __enter__(self) -> RoundLog:
        """Returns the log itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        self.close()

    def _check_range(self, first: int, last: int | None) -> int:
        """Returns the last round of a range, after checking that all of it is in the log."""
        end = self.last_round if last is None else last
        if not 1 <= first <= end + 1 or end > self.last_round:
            raise LogError(f"rounds {first} to {end} are not in a log of {self.last_round} rounds")
        return end

    def _note(self, entry: LogEntry, end: int) -> None:
        """Takes a whole entry, which ends at this offset of the file, into the index."""
        state = self._states[-1]
        if entry.base_fingerprint is not None:
            self._fingerprints.setdefault(state, entry.base_fingerprint)
        self._states.append(state if entry.empty else state + 1)
        self._ends.append(end)

    def _read(self, offset: int, count: int) -> bytes:
        parts = []
        self._file.seek(offset)
        while count > 0 and (part := self._file.read(count)):
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _scan(self) -> None:
        """Checks every record; cuts a torn tail."""
        total = os.fstat(self._file.fileno()).st_size
        while self.size < total:
            begin, round_number = self.size, self.last_round + 1
            try:
                length, told = read_head(self._read(begin, RECORD_HEAD_BYTES))
                entry = decode_entry(self._read(begin, length))
            except DamagedError as error:
                if self._valid_record_after(begin):
                    raise LogError(
                        f"offset {begin}, round {round_number}: {error}. Entries after it are "
                        "whole, so this is no torn tail: restore the log from a copy"
                    ) from None
                self._file.truncate(begin)
                os.fsync(self._file.fileno())
                self.cut_bytes = total - begin
                return
            except MessageError as error:  # undamaged: somebody wrote it like that
                raise LogError(f"offset {begin}, round {round_number}: {error}") from None
            if told != round_number or entry.num_blocks != self.header.identity.num_blocks:
                raise LogError(
                    f"offset {begin}: expected round {round_number} of "
                    f"{self.header.identity.num_blocks} blocks, found round {told} of "
                    f"{entry.num_blocks}"
                )
            self._note(entry, begin + length)

    def _valid_record_after(self, offset: int) -> bool:
        """Whether a whole record starts anywhere after ``offset``."""
        raw = self._read(offset, os.fstat(self._file.fileno()).st_size - offset)
        data = memoryview(raw)
        at = raw.find(RECORD_MAGIC, 1)
        while at >= 0:
            try:
                length, _ = read_head(data[at:])
                decode_entry(data[at : at + length])
                return True
            except MessageError:
                at = raw.find(RECORD_MAGIC, at + 1)
        return False


def _lock(file: BinaryIO, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise LogError(f"{path} is open in another server; two must not write one log") from None
