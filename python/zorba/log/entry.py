"""LogEntry: what one step or one round did to the weights, and its bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zorba.log.errors import DamagedLogError, LogError
from zorba.log.frame import END, ENTRY, SKIP, BodyReader, Frame, frame, salt_of, unframe, varint
from zorba.log.pattern import (
    MAX_TERMS,
    StepSeeds,
    count_terms,
    decode_pattern,
    encode_pattern,
    resolve,
)
from zorba.optim import NoiseTerms

MAX_COEFS = 1 << 26
"""Coefficients that one entry may have: groups times terms."""

# Flags of a body's first byte: which fields are there.
_PATTERN = 1  # the pattern of the terms; else samples 0, 1, ... of the step's own seed
_PARTS = 2  # several parts, each with its mask; else all terms are one part
_MAPPED = 4  # the column of each group; else one column is for all groups
_ROUNDING = 8  # a rounding seed; else it is the step's own seed
_DECAY = 16  # one decay for all groups
_DECAYS = 32  # a decay for each group
_BASE = 64  # fingerprint of the weights before the entry
_MASKS = 128  # version of the masks in force

# One byte holds all flags: a step of one perturbation then takes 16 bytes, CRCs included.
_U64 = struct.Struct("<Q")
_U32 = struct.Struct("<I")


@dataclass(frozen=True, eq=False)
class LogEntry:
    """One step of a fine-tune or one round of a federation: ``w <- round(w - decay * w + terms)``.

    Attributes:
        number: of the step or round; entries of a log have consecutive numbers.
        terms: noises with their final coefficients, learning rate included. Nobody computes them
            again. Groups whose coefficients are all 0 are left alone.
        rounding_seed: uint64 of the stochastic rounding.
        decay: float32 [groups], share of each weight that is taken off; or None.
        base: fingerprint of the weights before this entry; None where nobody knows it.
        mask_version: uint32 of the masks in force, 0 where there are none.
    """

    number: int
    terms: NoiseTerms
    rounding_seed: int
    decay: Tensor | None = None
    base: int | None = None
    mask_version: int = 0

    @property
    def empty(self) -> bool:
        """Whether it changes no weight: a skipped step, or a round that nobody measured."""
        return not self.terms.seeds and self.decay is None

    @property
    def scalar_bytes(self) -> int:
        """Bytes of coefficients and seeds alone, as they are written."""
        coefs = sum(part.coefs.nbytes for part in _parts(_matrix(self.terms.coefs)))
        return coefs + _U64.size * len(set(self.terms.seeds))

    def uncovered(self) -> list[int]:
        """Returns the groups whose coefficients are all 0."""
        return torch.nonzero(~(self.terms.coefs != 0).any(dim=1)).flatten().tolist()


class _Part(NamedTuple):
    """Consecutive terms that move the same groups: in a round with own directions, a client's."""

    columns: npt.NDArray[np.int64]  # [groups], column of each group; -1 where it is not moved
    coefs: npt.NDArray[np.float32]  # [terms, columns]


# --- Bytes of an entry ----------------------------------------------------------------------------


def encode_entry(entry: LogEntry, log_id: int, run_seed: int | None = None) -> bytes:
    """Returns an entry as a frame.

    Args:
        entry: what to write.
        log_id: uint64 of the log, which the frame's CRC depends on.
        run_seed: uint64; seeds of steps of this run are written in a few bits, others in full.

    Raises:
        LogError: numbers that are not finite, or more than a log takes.
    """
    return write_entry(entry, StepSeeds(run_seed), salt_of(log_id))


def write_entry(entry: LogEntry, seeds: StepSeeds, salt: int) -> bytes:
    """``encode_entry`` for a caller that writes many."""
    if entry.empty:
        return frame(SKIP, entry.number, b"", salt)
    return frame(ENTRY, entry.number, _body(entry, seeds), salt)


def _body(entry: LogEntry, seeds: StepSeeds) -> bytes:
    terms, number = entry.terms, entry.number
    coefs = _matrix(terms.coefs)
    # What no reader would take must not be written: a log that cannot be read is lost.
    if coefs.size > MAX_COEFS:
        raise LogError(f"an entry of {coefs.size} coefficients; at most {MAX_COEFS} are allowed")
    decay = None if entry.decay is None else _decays(entry.decay, len(coefs))
    if not np.isfinite(coefs).all() or (decay is not None and not np.isfinite(decay).all()):
        raise LogError(f"coefficients and decays of entry {number} must be finite")
    # The step's own seed is known to whoever reads the header, so it is not written.
    own = None if seeds.run_seed is None else seeds.of(number)
    flags, fields = 0, []
    count = len(terms.seeds)
    if set(terms.seeds) <= {own} and terms.samples == tuple(range(count)):
        fields.append(varint(count))
    else:
        flags |= _PATTERN
        fields.append(encode_pattern(terms.seeds, terms.samples, number, seeds.finder(number)))
    if entry.rounding_seed != own:
        flags |= _ROUNDING
        fields.append(_U64.pack(entry.rounding_seed))
    if decay is not None and (decay != 0).any():
        flags |= _DECAY if _same(decay) else _DECAYS
        fields.append(decay[: 1 if _same(decay) else None].tobytes())
    if entry.base is not None:
        flags |= _BASE
        fields.append(_U64.pack(entry.base))
    if entry.mask_version:
        flags |= _MASKS
        fields.append(_U32.pack(entry.mask_version))
    # Coefficients come last: their size follows from all that stands in front of them, so a reader
    # can check every count before it takes them.
    parts = _parts(coefs)
    if len(parts) > 1:
        flags |= _PARTS
        fields.append(varint(len(parts)))
    if any((part.columns != 0).any() for part in parts):
        flags |= _MAPPED
    for part in parts:
        fields += _part_fields(part, flags)
    return bytes([flags]) + b"".join(fields)


def _part_fields(part: _Part, flags: int) -> Iterator[bytes]:
    rows, columns = part.coefs.shape
    if flags & _PARTS:
        yield varint(rows)
    if flags & _MAPPED:
        yield varint(columns)
        # -1 becomes the largest number, which is no column.
        yield part.columns.astype(_map_type(columns)).tobytes()
    yield part.coefs.astype("<f4").tobytes()


def _map_type(columns: int) -> str:
    return "<u1" if columns < 255 else "<u2"


def _matrix(coefs: Tensor) -> npt.NDArray[np.float32]:
    """Coefficients on the host; -0 becomes 0, which changes no weight either."""
    plain = coefs.detach().to("cpu", torch.float32).numpy()
    matrix: npt.NDArray[np.float32] = np.add(plain, 0, dtype=np.float32)
    return matrix


def _decays(decay: Tensor, groups: int) -> npt.NDArray[np.float32]:
    column = decay.detach().to("cpu", torch.float32).reshape(-1)
    if len(column) not in (1, groups):
        raise LogError(f"decays of {len(column)} groups in an entry of {groups}")
    return column.expand(groups).numpy().astype("<f4")


def _same(values: npt.NDArray[np.float32]) -> bool:
    return bool((values == values[:1]).all())


def _parts(coefs: npt.NDArray[np.float32]) -> list[_Part]:
    """Splits the columns of coefs [groups, terms] where other groups are moved."""
    groups, terms = coefs.shape
    moved = coefs != 0
    starts = [0]
    # A term whose coefficients are all 0 fits any mask: a scalar of 0 starts no part of its own.
    last: npt.NDArray[np.bool_] | None = None
    for k in np.flatnonzero(moved.any(axis=0)).tolist() if groups > 1 else ():
        if last is not None and (moved[:, k] != last).any():
            starts.append(k)
        last = moved[:, k]
    ends = [*starts[1:], terms]
    return [_part(coefs[:, start:end]) for start, end in zip(starts, ends, strict=True)]


def _part(coefs: npt.NDArray[np.float32]) -> _Part:
    """Keeps one of equal rows [groups, terms], and none of those that are 0."""
    if len(coefs) == 1 or (coefs == coefs[:1]).all():
        return _Part(np.zeros(len(coefs), np.int64), np.ascontiguousarray(coefs[:1].T))
    # Groups that the same clients covered have equal rows, to the bit: one column serves them all.
    rows = np.flatnonzero((coefs != 0).any(axis=1))
    known: dict[bytes, int] = {}
    columns = np.full(len(coefs), -1, np.int64)
    for row in rows.tolist():
        columns[row] = known.setdefault(coefs[row].tobytes(), len(known))
    first = [int(np.argmax(columns == column)) for column in range(len(known))]
    return _Part(columns, np.ascontiguousarray(coefs[first].T))


# --- Entries of bytes -----------------------------------------------------------------------------


def decode_entries(
    data: bytes | memoryview,
    count: int,
    first: int,
    num_groups: int,
    log_id: int,
    run_seed: int | None = None,
) -> list[LogEntry]:
    """Returns ``count`` entries, numbered from ``first``, that fill ``data``.

    Raises:
        DamagedLogError: bytes were cut or changed, or are of another log.
        LogError: they are whole, but make no sense or have other numbers.
    """
    view, salt, seeds = memoryview(data), salt_of(log_id), StepSeeds(run_seed)
    entries: list[LogEntry] = []
    at = 0
    # Entries in a plan are consecutive: a gap would leave a replica one round behind for ever.
    for number in range(first, first + count):
        found = unframe(view, at, salt)
        if found.number != number or found.kind == END:
            raise LogError(f"expected entry {number}, found {found.number} of kind {found.kind}")
        entries.append(read_entry(found, num_groups, seeds))
        at = found.end
    if at != len(view):
        raise LogError(f"{len(view) - at} bytes follow the last of {count} entries")
    return entries


def read_entry(found: Frame, groups: int, seeds: StepSeeds) -> LogEntry:
    """Returns the entry of a frame; raises LogError if it makes no sense."""
    # Field by field in the order of the flags' table in docs/log.md.
    reader = BodyReader(found.body)
    if found.kind == SKIP:
        reader.end()
        return LogEntry(found.number, NoiseTerms.none(groups), 0)
    (flags,) = reader.raw(1, "an entry")
    if flags & _PATTERN:
        runs = decode_pattern(reader)
        count = count_terms(runs)
    else:
        count = reader.varint("number of terms")
    # Checked before anything of this size is made.
    if count > MAX_TERMS or count * groups > MAX_COEFS:
        raise LogError(f"an entry of {count} terms and {groups} groups is over the limits")
    rounding_seed = (
        reader.unpack(_U64, "rounding seed")[0] if flags & _ROUNDING else seeds.of(found.number)
    )
    decay = None
    if flags & (_DECAY | _DECAYS):
        rows = groups if flags & _DECAYS else 1
        decay = torch.from_numpy(_finite(reader.array("<f4", rows, "decays"))).expand(groups)
    base = reader.unpack(_U64, "base fingerprint")[0] if flags & _BASE else None
    version = reader.unpack(_U32, "mask version")[0] if flags & _MASKS else 0
    coefs = _read_coefs(reader, flags, count, groups)
    reader.end()
    # Last: by now the body is known to have a coefficient for each term that it claims.
    if flags & _PATTERN:
        names = resolve(runs, found.number, seeds.of)
    else:
        names = ((seeds.of(found.number),) * count, tuple(range(count)))
    return LogEntry(found.number, NoiseTerms(*names, coefs), rounding_seed, decay, base, version)


def _read_coefs(reader: BodyReader, flags: int, terms: int, groups: int) -> Tensor:
    """Takes the parts off a body: float32 [groups, terms]."""
    # No part is empty, but that of an entry without terms: the number of parts is bounded by bytes
    # that are there.
    count = reader.varint("number of parts") if flags & _PARTS else 1
    if not 1 <= count <= max(terms, 1):
        raise LogError(f"{terms} terms in {count} parts")
    parts = []
    left = terms
    for _ in range(count):
        rows = reader.varint("terms of a part") if flags & _PARTS else terms
        columns = reader.varint("number of columns") if flags & _MAPPED else 1
        # More columns than groups would be columns of nobody: only a forgery has them.
        if rows > left or columns > groups:
            raise LogError(f"a part of {rows} terms and {columns} columns is too large")
        left -= rows
        places = None
        if flags & _MAPPED:
            places = reader.array(_map_type(columns), groups, "columns").astype(np.int64)
            places[places == (255 if columns < 255 else 65535)] = columns
            if (places > columns).any():
                raise LogError(f"columns of groups must be below {columns}")
        coefs = _finite(reader.array("<f4", rows * columns, "coefficients")).reshape(rows, columns)
        parts.append(_spread(coefs, places, groups))
    if left:
        raise LogError(f"{left} of {terms} terms are in no part")
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _spread(
    coefs: npt.NDArray[np.float32], places: npt.NDArray[np.int64] | None, groups: int
) -> Tensor:
    """Gives each group its column of coefs [terms, columns]; the one behind the last is 0."""
    if places is None:
        # A view: thousands of groups with one row of coefficients take no memory.
        return torch.from_numpy(np.ascontiguousarray(coefs.T)).expand(groups, -1)
    padded = np.zeros((coefs.shape[1] + 1, coefs.shape[0]), np.float32)
    padded[:-1] = coefs.T
    return torch.from_numpy(padded[places])


def _finite(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    if not np.isfinite(values).all():
        raise LogError("coefficients and decays of an entry are not all finite")
    return values.astype(np.float32)


def end_frame(number: int, fingerprint: int, salt: int) -> bytes:
    """Returns the frame that ends a finished run: the fingerprint of the weights after it."""
    return frame(END, number, _U64.pack(fingerprint), salt)


def read_end(found: Frame) -> int:
    """Returns the fingerprint of an end."""
    if len(found.body) != _U64.size:
        raise DamagedLogError(f"the end has {len(found.body)} bytes, expected {_U64.size}")
    return int(_U64.unpack(found.body)[0])
