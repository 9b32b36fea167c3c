"""LogEntry: all that a round did to the weights, and its bytes in the log and in plans."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from zorba.federated.codec import (
    Reader,
    decode_choice,
    pack_checked,
)
from zorba.federated.errors import DamagedError, MessageError
from zorba.federated.identity import MAX_BLOCKS
from zorba.federated.settings import MAX_STEPS
from zorba.log.binary import DISTRIBUTION_CODES, ROUNDING_CODES
from zorba_kernels.noise import NOISE_VERSION, Distribution, Rounding

RECORD_MAGIC = b"ZRLE"
MAX_ENTRY_BYTES = 1 << 26
UNCOVERED = -1
"""Column of a block that no client covered in the round."""

# magic, length, round, K, P, blocks, columns, noise, distribution, rounding, 0, mask version
_HEAD = struct.Struct("<4sIIHHHHBBBBI")
_CRC = struct.Struct("<I")
_FIXED = struct.Struct("<QQ")  # rounding seed, base fingerprint
RECORD_HEAD_BYTES = _HEAD.size + _CRC.size


@dataclass(frozen=True, eq=False)
class LogEntry:
    """One round: ``w[block] += sum_kp coefs[k, p, columns[block]] * z(seeds[k], sample p)``.

    A round in which nobody measured anything has an entry without columns: it changes no weight
    and keeps the numbering free of gaps.

    Attributes:
        round: from 1.
        seeds: uint64 of each local step, [K]; sample p of a seed is perturbation p.
        coefs: final coefficients, learning rate included: float32 [K, P, columns].
        columns: column of each block, or ``UNCOVERED``: int32 [blocks].
        rounding_seed: uint64.
        mask_version: of the masks that were in force.
        base_fingerprint: of the replicas before this entry, as clients told it; None if none did.
        distribution: of the noise.
        rounding: of 16-bit weights.
        noise_version: of the noise contract.
    """

    round: int
    seeds: tuple[int, ...]
    coefs: npt.NDArray[np.float32]
    columns: npt.NDArray[np.int32]
    rounding_seed: int
    mask_version: int
    base_fingerprint: int | None
    distribution: Distribution
    rounding: Rounding
    noise_version: int = NOISE_VERSION

    def __post_init__(self) -> None:
        """Raises MessageError where the parts do not belong together."""
        if self.coefs.ndim != 3 or self.coefs.dtype != np.float32:
            raise MessageError(f"coefs must be float32 [K, P, columns], got {self.coefs.shape}")
        steps, _, columns = self.coefs.shape
        if steps != len(self.seeds):
            raise MessageError(f"{len(self.seeds)} seeds but coefs of {steps} local steps")
        if self.columns.ndim != 1 or not 1 <= len(self.columns) <= MAX_BLOCKS:
            raise MessageError(f"an entry has 1 to {MAX_BLOCKS} blocks, got {self.columns.shape}")
        if self.columns.min() < UNCOVERED or self.columns.max() >= columns:
            raise MessageError(f"columns of blocks must be below {columns}, or {UNCOVERED}")
        if not np.isfinite(self.coefs).all():
            raise MessageError(f"coefficients of round {self.round} must be finite")

    @property
    def num_blocks(self) -> int:
        """Blocks of the model."""
        return len(self.columns)

    @property
    def num_perturbations(self) -> int:
        """P."""
        return int(self.coefs.shape[1])

    @property
    def empty(self) -> bool:
        """Whether the entry changes no weight at all."""
        return self.coefs.size == 0

    @property
    def scalar_bytes(self) -> int:
        """Bytes of the coefficients and seeds alone."""
        return int(self.coefs.nbytes) + 8 * len(self.seeds)

    def block_coefs(self) -> npt.NDArray[np.float32]:
        """Returns the coefficients of every block: float32 [blocks, K * P], 0 where uncovered."""
        flat = self.coefs.reshape(-1, self.coefs.shape[2])
        out = np.zeros((self.num_blocks, flat.shape[0]), dtype=np.float32)
        covered = self.columns != UNCOVERED
        out[covered] = flat.T[self.columns[covered]]
        return out

    @cached_property
    def record(self) -> bytes:
        """The entry's bytes."""
        steps, samples, columns = self.coefs.shape
        narrow = columns < 255
        index = self.columns.astype("<u1" if narrow else "<u2")  # UNCOVERED becomes the largest
        body = b"".join(
            (
                pack_checked(_FIXED, "log entry", self.rounding_seed, self.base_fingerprint or 0),
                pack_checked(struct.Struct(f"<{steps}Q"), "seeds", *self.seeds),
                self.coefs.astype("<f4").tobytes(),
                index.tobytes(),
            )
        )
        head = pack_checked(
            _HEAD,
            "log entry",
            RECORD_MAGIC,
            RECORD_HEAD_BYTES + len(body) + _CRC.size,
            self.round,
            steps,
            samples,
            self.num_blocks,
            columns,
            self.noise_version,
            DISTRIBUTION_CODES[self.distribution],
            ROUNDING_CODES[self.rounding],
            0,
            self.mask_version,
        )
        first = zlib.crc32(head)
        # Not over the head's CRC as well: data followed by its CRC leaves the same CRC, whatever
        # the data, and the last one would say nothing of the head.
        return head + _CRC.pack(first) + body + _CRC.pack(zlib.crc32(body, first))


def read_head(data: bytes | memoryview) -> tuple[int, int]:
    """Checks the head of a record, which has a CRC of its own so that its sizes can be trusted.

    Args:
        data: at least the head; what follows is not looked at.

    Returns:
        Length of the whole record, and its round.

    Raises:
        DamagedError: it is no whole head of a record.
        MessageError: it is, but of another version, or its sizes make no sense.
    """
    if len(data) < RECORD_HEAD_BYTES:
        raise DamagedError(f"a log entry needs {RECORD_HEAD_BYTES} bytes, {len(data)} are left")
    fields = _HEAD.unpack_from(data)
    magic, length, round_number, steps, samples, blocks, columns, noise = fields[:8]
    if magic != RECORD_MAGIC:
        raise DamagedError(f"a log entry starts with {RECORD_MAGIC!r}, got {bytes(magic)!r}")
    if _CRC.unpack_from(data, _HEAD.size)[0] != zlib.crc32(data[: _HEAD.size]):
        raise DamagedError("the CRC of a log entry's head does not match")
    if noise != NOISE_VERSION:
        raise MessageError(
            f"log entry of noise version {noise}, this package makes version {NOISE_VERSION}"
        )
    if steps > MAX_STEPS or samples > MAX_STEPS or not 1 <= blocks <= MAX_BLOCKS:
        raise MessageError(f"log entry of K={steps}, P={samples}, {blocks} blocks: over the limits")
    if columns > blocks or fields[10] != 0:
        raise MessageError(f"log entry of {columns} columns for {blocks} blocks")
    expected = (
        RECORD_HEAD_BYTES
        + _FIXED.size
        + 8 * steps
        + 4 * steps * samples * columns
        + blocks * (1 if columns < 255 else 2)
        + _CRC.size
    )
    if length != expected or length > MAX_ENTRY_BYTES:
        raise MessageError(f"log entry says {length} bytes, its sizes make {expected}")
    return length, round_number


def decode_entry(data: bytes | memoryview) -> LogEntry:
    """Returns the entry of a record.

    Raises:
        DamagedError: the record is damaged or cut, or has bytes after it.
        MessageError: it is whole, but of another version, or its values make no sense.
    """
    length, _ = read_head(data)
    if length != len(data):
        raise DamagedError(f"log entry says {length} bytes but {len(data)} are there")
    (crc,) = _CRC.unpack_from(data, length - _CRC.size)
    body = data[RECORD_HEAD_BYTES : length - _CRC.size]
    if crc != zlib.crc32(body, zlib.crc32(data[: _HEAD.size])):
        raise DamagedError("the CRC of a log entry does not match")
    head = _HEAD.unpack_from(data)
    _, _, round_number, steps, samples, blocks, columns, noise, law, rounding, _, version = head
    view = memoryview(data)[RECORD_HEAD_BYTES : length - _CRC.size]
    reader = Reader(view)
    rounding_seed, base = reader.unpack(_FIXED, "log entry")
    seeds = reader.array("<u8", steps, "seeds")
    coefs = reader.array("<f4", steps * samples * columns, "coefficients")
    narrow = columns < 255
    index = reader.array("<u1" if narrow else "<u2", blocks, "columns").astype(np.int32)
    index[index == (255 if narrow else 65535)] = UNCOVERED
    reader.end()
    return LogEntry(
        round=round_number,
        seeds=tuple(int(s) for s in seeds),
        coefs=coefs.astype(np.float32).reshape(steps, samples, columns),
        columns=index,
        rounding_seed=rounding_seed,
        mask_version=version,
        base_fingerprint=base or None,
        distribution=decode_choice(DISTRIBUTION_CODES, law, "distribution"),
        rounding=decode_choice(ROUNDING_CODES, rounding, "rounding"),
        noise_version=noise,
    )


def split_records(data: bytes | memoryview, count: int) -> list[LogEntry]:
    """Returns ``count`` entries that lie one after the other and fill ``data``."""
    view = memoryview(data)
    entries = []
    for _ in range(count):
        length, _ = read_head(view)
        entries.append(decode_entry(view[:length]))
        view = view[length:]
    if len(view):
        raise MessageError(f"{len(view)} bytes follow the last of {count} log entries")
    return entries
