"""LogEntry: what one step or one round did to the weights, and its bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zorba.log.binary import END, ENTRY, SKIP, U64, Frame, LogError, Reader, frame, unframe, varint
from zorba.log.pattern import MAX_TERMS, Run, decode_pattern, encode_pattern, resolve, seed_of
from zorba.optim import NoiseTerms

MAX_COEFS = 1 << 26  # of an entry: groups times terms

# Flags of a body's first byte: which fields are there. One byte holds all of them: a step of one
# perturbation then takes 16 bytes, CRCs included.
_PATTERN = 1  # the pattern of the terms; else samples 0, 1, ... of the step's own seed
_PARTS = 2  # several parts, each with its mask; else all terms are one part
_MAPPED = 4  # the column of each group; else one column is for all groups
_ROUNDING = 8  # a rounding seed; else it is the step's own seed
_DECAY = 16  # one decay for all groups
_DECAYS = 32  # a decay for each group
_BASE = 64  # fingerprint of the weights before the entry
_MASKS = 128  # version of the masks in force

_U32 = struct.Struct("<I")


@dataclass(frozen=True, eq=False)
class LogEntry:
    """A step of a fine-tune or a round of a federation: ``w <- round(w - decay * w + terms)``."""

    number: int  # of the step or round; entries of a log have consecutive numbers
    terms: NoiseTerms  # with final coefficients, learning rate included: nobody computes them again
    rounding_seed: int  # uint64 of the stochastic rounding
    decay: Tensor | None = None  # float32 [groups], share of each weight that is taken off
    base: int | None = None  # fingerprint of the weights before this entry, where it is known
    mask_version: int = 0  # uint32 of the masks in force, 0 where there are none

    @property
    def empty(self) -> bool:
        """Whether it changes no weight: a skipped step, or a round that nobody measured."""
        return not self.terms.seeds and self.decay is None

    @property
    def scalar_bytes(self) -> int:
        """Bytes of coefficients and seeds alone, as they are written."""
        coefs = sum(part.coefs.nbytes for part in _parts(_matrix(self.terms.coefs)))
        return coefs + U64.size * len(set(self.terms.seeds))

    def uncovered(self) -> list[int]:
        """Returns the groups whose coefficients are all 0."""
        return torch.nonzero(~(self.terms.coefs != 0).any(dim=1)).flatten().tolist()


def encode_entry(entry: LogEntry, log_id: int, run_seed: int | None = None) -> bytes:
    """Returns an entry as a frame of the log; seeds of steps of its run take a few bits.

    LogError: numbers that are not finite, or more than a log takes.
    """
    terms, number, coefs = entry.terms, entry.number, _matrix(entry.terms.coefs)
    if entry.empty:
        return frame(SKIP, number, b"", log_id)
    # What no reader would take must not be written: a log that cannot be read is lost.
    if coefs.size > MAX_COEFS:
        raise LogError(f"an entry of {coefs.size} coefficients; at most {MAX_COEFS} are allowed")
    decay = torch.zeros(1) if entry.decay is None else entry.decay.detach().float().cpu().flatten()
    if len(decay) not in (1, len(coefs)):
        raise LogError(f"decays of {len(decay)} groups in an entry of {len(coefs)}")
    if not np.isfinite(coefs).all() or not decay.isfinite().all():
        raise LogError(f"coefficients and decays of entry {number} must be finite")
    # The step's own seed is known to whoever reads the header, so it is not written.
    own = None if run_seed is None else seed_of(run_seed, number)
    flags, fields = 0, []
    count = len(terms.seeds)
    if set(terms.seeds) <= {own} and terms.samples == tuple(range(count)):
        fields.append(varint(count))
    else:
        flags |= _PATTERN
        fields.append(encode_pattern(terms.seeds, terms.samples, number, run_seed))
    if entry.rounding_seed != own:
        flags |= _ROUNDING
        fields.append(U64.pack(entry.rounding_seed))
    if decay.any():
        same = bool((decay == decay[0]).all())
        flags |= _DECAY if same else _DECAYS
        fields.append(decay[: 1 if same else None].numpy().astype("<f4").tobytes())
    if entry.base is not None:
        flags |= _BASE
        fields.append(U64.pack(entry.base))
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
        rows, columns = part.coefs.shape
        if flags & _PARTS:
            fields.append(varint(rows))
        if flags & _MAPPED:
            # -1 becomes the largest number, which is no column.
            fields += [varint(columns), part.columns.astype(_map_type(columns)).tobytes()]
        fields.append(part.coefs.astype("<f4").tobytes())
    return frame(ENTRY, number, bytes([flags]) + b"".join(fields), log_id)


def _map_type(columns: int) -> str:
    return "<u1" if columns < 255 else "<u2"


def _matrix(coefs: Tensor) -> npt.NDArray[np.float32]:
    """Coefficients on the host; -0 becomes 0, which changes no weight either."""
    return (coefs.detach().to("cpu", torch.float32) + 0).numpy()


class _Part(NamedTuple):
    """Consecutive terms that move the same groups: in a round with own directions, a client's."""

    columns: npt.NDArray[np.int64]  # [groups], column of each group; -1 where it is not moved
    coefs: npt.NDArray[np.float32]  # [terms, columns]


def _parts(coefs: npt.NDArray[np.float32]) -> list[_Part]:
    """Splits the columns of coefs [groups, terms] where other groups are moved."""
    moved = coefs != 0
    starts = [0]
    # A term whose coefficients are all 0 fits any mask: a scalar of 0 starts no part of its own.
    some = np.flatnonzero(moved.any(axis=0)).tolist() if len(coefs) > 1 else []
    starts += [k for last, k in pairwise(some) if (moved[:, k] != moved[:, last]).any()]
    return [_part(coefs[:, start:end]) for start, end in pairwise([*starts, coefs.shape[1]])]


def _part(coefs: npt.NDArray[np.float32]) -> _Part:
    """Keeps one of equal rows [groups, terms], and none of those that are 0."""
    if len(coefs) == 1 or (coefs == coefs[:1]).all():
        return _Part(np.zeros(len(coefs), np.int64), coefs[:1].T)
    # Groups that the same clients covered have equal rows, to the bit: one column serves them all.
    known: dict[bytes, int] = {}
    columns = np.full(len(coefs), -1, np.int64)
    for row in np.flatnonzero((coefs != 0).any(axis=1)).tolist():
        columns[row] = known.setdefault(coefs[row].tobytes(), len(known))
    return _Part(columns, np.frombuffer(b"".join(known), np.float32).reshape(len(known), -1).T)


def decode_entries(
    data: bytes, count: int, first: int, num_groups: int, log_id: int, run_seed: int | None = None
) -> list[LogEntry]:
    """Returns ``count`` entries, numbered from ``first``, that fill ``data``.

    DamagedLogError: bytes were cut or changed, or are of another log. LogError: they are whole, but
    make no sense or have other numbers.
    """
    view, at = memoryview(data), 0
    entries: list[LogEntry] = []
    # Entries in a plan are consecutive: a gap would leave a replica one round behind for ever.
    for number in range(first, first + count):
        found = unframe(view, at, log_id)
        if found.number != number or found.kind == END:
            raise LogError(f"expected entry {number}, found {found.number} of kind {found.kind}")
        entries.append(read_entry(found, num_groups, run_seed))
        at = found.end
    if at != len(view):
        raise LogError(f"{len(view) - at} bytes follow the last of {count} entries")
    return entries


def read_entry(found: Frame, groups: int, run_seed: int | None) -> LogEntry:
    """Returns the entry of a frame; raises LogError if it makes no sense."""
    # Field by field in the order of the flags' table in docs/log.md.
    reader = Reader(found.body)
    if found.kind == SKIP:
        reader.end()
        return LogEntry(found.number, NoiseTerms.none(groups), 0)
    (flags,) = reader.raw(1, "an entry")
    if flags & _PATTERN:
        runs = decode_pattern(reader)
    else:
        count = reader.varint("number of terms")
        runs = [Run(None, 0, 0, count)] if count else []
    count = sum(run.samples * run.seeds for run in runs)
    # Checked before anything of this size is made.
    if count > MAX_TERMS or count * groups > MAX_COEFS:
        raise LogError(f"an entry of {count} terms and {groups} groups is over the limits")
    if flags & _ROUNDING:
        (rounding_seed,) = reader.unpack(U64, "rounding seed")
    else:
        rounding_seed = seed_of(run_seed, found.number)
    decay = None
    if flags & (_DECAY | _DECAYS):
        decays = _reals(reader, groups if flags & _DECAYS else 1, "decays")
        decay = torch.from_numpy(decays).expand(groups)
    base = reader.unpack(U64, "base fingerprint")[0] if flags & _BASE else None
    version = reader.unpack(_U32, "mask version")[0] if flags & _MASKS else 0
    coefs = _read_coefs(reader, flags, count, groups)
    reader.end()
    # Last: by now the body is known to have a coefficient for each term that it claims.
    terms = NoiseTerms(*resolve(runs, found.number, run_seed), coefs)
    return LogEntry(found.number, terms, rounding_seed, decay, base, version)


def _read_coefs(reader: Reader, flags: int, terms: int, groups: int) -> Tensor:
    """Takes the parts off a body: float32 [groups, terms]."""
    # No part is empty, but that of an entry without terms: the number of parts is bounded by bytes
    # that are there.
    count = reader.varint("number of parts") if flags & _PARTS else 1
    if not 1 <= count <= max(terms, 1):
        raise LogError(f"{terms} terms in {count} parts")
    parts, left = [], terms
    for _ in range(count):
        rows = reader.varint("terms of a part") if flags & _PARTS else terms
        columns = reader.varint("number of columns") if flags & _MAPPED else 1
        # More columns than groups would be columns of nobody: only a forgery has them.
        if rows > left or columns > groups:
            raise LogError(f"a part of {rows} terms and {columns} columns is too large")
        left -= rows
        places = np.zeros(1, np.int64)  # one column for all groups: expanded, it takes no memory
        if flags & _MAPPED:
            places = reader.array(_map_type(columns), groups, "columns").astype(np.int64)
            places[places == (255 if columns < 255 else 65535)] = columns
            if (places > columns).any():
                raise LogError(f"columns of groups must be below {columns}")
        coefs = _reals(reader, rows * columns, "coefficients").reshape(rows, columns).T
        padded = np.vstack([coefs, np.zeros((1, rows), np.float32)])  # of groups not moved
        parts.append(torch.from_numpy(padded[places]).expand(groups, -1))
    if left:
        raise LogError(f"{left} of {terms} terms are in no part")
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _reals(reader: Reader, count: int, what: str) -> npt.NDArray[np.float32]:
    values = reader.array("<f4", count, what).astype(np.float32)
    if not np.isfinite(values).all():
        raise LogError(f"{what} of an entry are not all finite")
    return values
