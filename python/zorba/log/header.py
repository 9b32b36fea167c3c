"""LogHeader: which weights a log starts from, what holds for all of its entries, and its bytes.

A file starts with ``magic[8] format:u16 0:u16 plain:u32 packed:u32 text crc:u32``, little-endian:
the fields as JSON, compressed, with their sizes and the CRC-32 of all that stands in front of it.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from zorba.identity import MAX_BLOCKS, ModelIdentity, package_version
from zorba.log.binary import CRC, DamagedLogError, LogError, Reader
from zorba.tables import TableLike, each_table
from zorba_kernels.noise import DISTRIBUTIONS, ROUNDINGS, VERSIONS, Distribution, Rounding
from zorba_kernels.table import DTYPE_CODES

MAGIC, FORMAT = b"ZORBALOG", 2
MAX_TEXT_BYTES = 1 << 26  # of a header, plain

_FIXED = struct.Struct("<8sHHII")
_OLD = (b"ZORBAZOT", MAGIC + b"\1\0")  # starts of 0.1.0's trajectories and logs


@dataclass(frozen=True)
class Parameter:
    """An active parameter: canonical name, shape, dtype ("bfloat16") and group."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: int


@dataclass(frozen=True)
class LogHeader:
    """What all entries of a log share."""

    log_id: int  # uint64 that tells logs apart: a federation's job, or a hash of the other fields
    identity: ModelIdentity  # before the first entry; its blocks are the groups of coefficients
    distribution: Distribution
    rounding: Rounding
    first: int = 1  # number of the first entry: 1 for the rounds of a federation, 0 for steps
    # Uint64; step t is of seed step_seed(run_seed, t), unless its entry says otherwise.
    run_seed: int | None = None
    parameters: tuple[Parameter, ...] = ()  # active ones; none where the writer had no model
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the run, for people alone
    architecture: str | None = None  # class of the model
    dtype: str | None = None  # of most of the model's weights, as in "bfloat16"
    package: str = field(default_factory=package_version)  # that wrote it
    noise_version: int = -1  # of the noise contract; -1: the one that defined the distribution

    def __post_init__(self) -> None:
        me = self.identity
        numbers = {"log_id": self.log_id, "run_seed": self.run_seed, "first": self.first}
        for what, value in (numbers | vars(me)).items():
            # bool is an int to Python, and 1.0 equals 1: only plain integers have one encoding.
            fits = type(value) is int and 0 <= value < 1 << 64
            if not fits and not (value is None and what in ("run_seed", "origin")):
                raise LogError(f"{what} must be a uint64, got {value!r}")
        if not 1 <= me.num_blocks <= MAX_BLOCKS:
            raise LogError(f"{me.num_blocks} groups; a log has 1 to {MAX_BLOCKS}")
        if self.distribution not in DISTRIBUTIONS or self.rounding not in ROUNDINGS:
            raise LogError(f"unknown noise {self.distribution!r} or rounding {self.rounding!r}")
        if self.noise_version < 0:
            object.__setattr__(self, "noise_version", VERSIONS[self.distribution])
        texts = [self.package, *(t for t in (self.architecture, self.dtype) if t is not None)]
        if not isinstance(self.settings, Mapping) or not all(isinstance(t, str) for t in texts):
            raise LogError("settings are no mapping, or a name is no text")
        dtypes = set(map(dtype_name, DTYPE_CODES))
        for p in self.parameters:
            sizes_fit = all(type(n) is int and n >= 0 for n in p.shape)
            group_fits = type(p.group) is int and 0 <= p.group < me.num_blocks
            known = isinstance(p.name, str) and p.dtype in dtypes
            if not (known and sizes_fit and group_fits):
                raise LogError(f"{p} makes no sense in a log of {me.num_blocks} groups")
        if len({p.name for p in self.parameters}) != len(self.parameters):
            raise LogError("two parameters have one name")

    @property
    def num_groups(self) -> int:
        """Rows of coefficients."""
        return self.identity.num_blocks

    def with_own_id(self) -> LogHeader:
        """Returns the header with a log id that is a hash of all other fields."""
        # No CRC: that of bytes which end in their own CRC would be the same for every header.
        digest = hashlib.sha256(replace(self, log_id=0).encode()).digest()
        return replace(self, log_id=int.from_bytes(digest[:8], "little"))

    def encode(self) -> bytes:
        """Returns the header's bytes."""
        # JSON, since a header is read by people too (``python -m json.tool`` after inflating), and
        # written once a run: only entries must be small.
        values = vars(self) | {"identity": vars(self.identity), "settings": dict(self.settings)}
        # Columns, not rows: names that repeat a pattern compress better side by side.
        values["parameters"] = [
            [getattr(p, f.name) for p in self.parameters] for f in fields(Parameter)
        ]
        try:
            text = json.dumps(values, separators=(",", ":"), allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            told = "settings must be plain JSON (text, finite numbers, lists, ...)"
            raise LogError(f"{told}: {error}") from None
        if len(text) > MAX_TEXT_BYTES:
            raise LogError(f"names and settings take {len(text)} bytes: too many")
        packed = zlib.compress(text, 9)
        data = _FIXED.pack(MAGIC, FORMAT, 0, len(text), len(packed)) + packed
        return data + CRC.pack(zlib.crc32(data))

    def difference(self, other: LogHeader) -> str | None:
        """Returns a sentence on the first thing in which another log differs, or None."""
        for what, name in (("job", "log_id"), ("distribution",) * 2, ("rounding",) * 2):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"another {what}: {theirs}, expected {mine}"
        return self.identity.difference(other.identity)

    def parameter_difference(self, others: Iterable[Parameter]) -> str | None:
        """Returns a sentence on the first thing in which other parameters differ, or None."""
        theirs = {p.name: p for p in others}
        mine = {p.name: p for p in self.parameters}
        for names, what in ((mine.keys() - theirs, "missing"), (theirs.keys() - mine, "too many")):
            if names:
                shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
                return f"{len(names)} parameters are {what}: {shown}"
        for name, p in mine.items():
            for what, want in vars(p).items():
                have = getattr(theirs[name], what)
                if have != want:
                    return f"{name!r} has {what} {have}, expected {want}"
        return None


def decode_header(data: bytes | memoryview) -> tuple[LogHeader, int]:
    """Returns the header that a file starts with, and where it ends; or raises LogError."""
    view = memoryview(data)
    start = bytes(view[:10])
    if start.startswith(_OLD):
        raise LogError("format 1, of version 0.1.0: read it with the package that wrote it")
    if start[:8] != MAGIC[: len(start)] or not start:
        raise LogError(f"this is no trajectory and no log: it starts with {start[:8]!r}")
    reader = Reader(view)
    reader.error = DamagedLogError
    _, version, zero, plain_bytes, packed_bytes = reader.unpack(_FIXED, "the start of a log")
    if version != FORMAT or zero:
        raise LogError(f"log format {version}, this package reads {FORMAT}")
    packed = reader.raw(packed_bytes, "the header of a log")
    (crc,) = reader.unpack(CRC, "the CRC of the header")
    end = len(view) - reader.left
    # The CRC first: what does not pass it is damage, what passes and makes no sense is a lie.
    if crc != zlib.crc32(view[: end - CRC.size]):
        raise DamagedLogError("the header is damaged: its CRC does not match")
    # Whatever JSON may hold here, it ends as a checked LogHeader or as one sentence.
    try:
        # Never unpacked further than the header says: a small file may hold gigabytes of zeros.
        stream = zlib.decompressobj()
        text = stream.decompress(packed, min(plain_bytes, MAX_TEXT_BYTES) + 1)
        if len(text) != plain_bytes or not stream.eof or stream.unused_data:
            raise LogError(f"the header's text should have {plain_bytes} bytes unpacked")
        values = json.loads(text)
        if not values["noise_version"] > 0:
            raise ValueError("the noise has no version")
        values["identity"] = ModelIdentity(**values["identity"])
        rows = zip(*values["parameters"], strict=True)
        values["parameters"] = tuple(Parameter(n, tuple(s), d, g) for n, s, d, g in rows)
        header = LogHeader(**values)
    except (zlib.error, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise LogError(f"the header's text makes no sense: {error!r}") from None
    # Noise of another version has other values: replaying it would build another model.
    mine = VERSIONS[header.distribution]
    if header.noise_version != mine:
        raise LogError(
            f"the log is of noise version {header.noise_version}, this package makes version "
            f"{mine} of {header.distribution} noise: replay it with the package that wrote it"
        )
    return header, end


def parameters_of(tables: TableLike) -> tuple[Parameter, ...]:
    """Returns the parameters that a header lists."""
    entries = [entry for table in each_table(tables) for entry in table.entries]
    for e in entries:
        if e.offset:
            raise LogError(f"{e.name!r} is a shard (from element {e.offset}): gather it first")
    return tuple(
        Parameter(e.name, tuple(e.tensor.shape), dtype_name(e.tensor.dtype), e.group)
        for e in entries
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Returns "bfloat16" for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
