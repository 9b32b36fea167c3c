"""TrajectoryHeader: what a trajectory starts from, and its bytes."""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import zorba_kernels as zk
from zorba.log.binary import DISTRIBUTION_CODES, ROUNDING_CODES, decode_choice
from zorba.log.errors import DamagedError, TrajectoryError
from zorba_kernels.noise import MAX_ELEMENTS, NOISE_VERSION, Distribution, Rounding
from zorba_kernels.table import DTYPE_CODES

MAGIC = b"ZORBAZOT"
FORMAT = 1
MAX_GROUPS = 65534
MAX_TEXT_BYTES = 1 << 26
"""Neither the compressed nor the plain text of a header is longer."""

# magic, format, noise version, distribution, rounding, whole is known, 0, groups, run seed, first
# step, base, whole, bytes of text, bytes of it compressed
_FIXED = struct.Struct("<8sHBBBBHIQQQQII")
_CRC = struct.Struct("<I")
FIXED_BYTES = _FIXED.size + _CRC.size

_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


@dataclass(frozen=True)
class Parameter:
    """An active parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    group: int


@dataclass(frozen=True)
class TrajectoryHeader:
    """What a trajectory starts from, and what holds for all of its steps.

    Attributes:
        run_seed: uint64; step t is of seed ``step_seed(run_seed, t)`` unless it says otherwise.
        first_step: number of the first step, which is applied to the base.
        distribution: of the noise.
        rounding: of 16-bit weights.
        parameters: the active ones.
        num_groups: rows of coefficients.
        base: fingerprint of the active parameters before the first step.
        whole: fingerprint of all the model's parameters before the first step, or None.
        settings: of the run (learning rate, eps, ...), to be read by people; nothing uses them.
        architecture: class of the model, or None.
        dtype: that most of the model's weights have, as in "bfloat16", or None.
        package: version of the package that wrote it.
        noise_version: of the noise contract.
    """

    run_seed: int
    first_step: int
    distribution: Distribution
    rounding: Rounding
    parameters: tuple[Parameter, ...]
    num_groups: int
    base: int
    whole: int | None
    settings: Mapping[str, Any]
    architecture: str | None
    dtype: str | None
    package: str
    noise_version: int = NOISE_VERSION

    def encode(self) -> bytes:
        """Returns the header's bytes."""
        if not 1 <= self.num_groups <= MAX_GROUPS:
            raise TrajectoryError(f"{self.num_groups} groups; a trajectory has 1 to {MAX_GROUPS}")
        text = self._text()
        packed = zlib.compress(text, 9)
        if len(text) > MAX_TEXT_BYTES:
            raise TrajectoryError(f"names and settings take {len(text)} bytes: too many")
        fixed = _FIXED.pack(
            MAGIC,
            FORMAT,
            self.noise_version,
            DISTRIBUTION_CODES[self.distribution],
            ROUNDING_CODES[self.rounding],
            self.whole is not None,
            0,
            self.num_groups,
            self.run_seed,
            self.first_step,
            self.base,
            self.whole or 0,
            len(text),
            len(packed),
        )
        crc = zlib.crc32(fixed)
        # Continued from that of the fields: the CRC of data and its own CRC would be a constant.
        return fixed + _CRC.pack(crc) + packed + _CRC.pack(zlib.crc32(packed, crc))

    def parameter_difference(self, others: Iterable[Parameter], groups: bool = True) -> str | None:
        """Returns a sentence on the first thing in which other parameters differ, or None.

        Args:
            others: in any order.
            groups: whether groups must agree.
        """
        theirs = {p.name: p for p in others}
        mine = {p.name: p for p in self.parameters}
        for names, what in ((mine.keys() - theirs, "missing"), (theirs.keys() - mine, "too many")):
            if names:
                shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
                return f"{len(names)} parameters are {what}: {shown}"
        for name, p in mine.items():
            for what in ("shape", "dtype", *(["group"] if groups else [])):
                have, want = getattr(theirs[name], what), getattr(p, what)
                if have != want:
                    return f"{name!r} has {what} {have}, expected {want}"
        return None

    def _text(self) -> bytes:
        fields = {
            "names": [p.name for p in self.parameters],
            "shapes": [p.shape for p in self.parameters],
            "dtypes": [DTYPE_CODES[p.dtype] for p in self.parameters],
            "groups": [p.group for p in self.parameters],
            "settings": dict(self.settings),
            "architecture": self.architecture,
            "dtype": self.dtype,
            "package": self.package,
        }
        try:
            return json.dumps(fields, separators=(",", ":"), allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise TrajectoryError(
                f"settings must be what JSON knows (text, finite numbers, lists, ...): {error}"
            ) from None


def decode_header(data: bytes | memoryview) -> tuple[TrajectoryHeader, int]:
    """Returns the header that a file starts with, and where it ends.

    Raises:
        DamagedError: it is cut or changed.
        TrajectoryError: it is of another format or noise version, or makes no sense.
    """
    view = memoryview(data)
    if bytes(view[: len(MAGIC)]) != MAGIC[: len(view)] or len(view) == 0:
        raise TrajectoryError(f"this is no trajectory: it starts with {bytes(view[:8])!r}")
    if len(view) < FIXED_BYTES:
        raise DamagedError(f"a trajectory has at least {FIXED_BYTES} bytes, {len(view)} are there")
    fields = _FIXED.unpack_from(view)
    _, version, noise, law, rounding, known, zero, groups = fields[:8]
    run_seed, first_step, base, whole, plain_bytes, packed_bytes = fields[8:]
    crc = zlib.crc32(view[: _FIXED.size])
    if _CRC.unpack_from(view, _FIXED.size)[0] != crc:
        raise DamagedError("the header is damaged: its CRC does not match")
    if version != FORMAT:
        raise TrajectoryError(f"trajectory format {version}, this package reads {FORMAT}")
    if noise != NOISE_VERSION:
        raise TrajectoryError(
            f"the trajectory is of noise version {noise}, this package makes version "
            f"{NOISE_VERSION}: replay it with the package that wrote it"
        )
    if known > 1 or zero or not 1 <= groups <= MAX_GROUPS or plain_bytes > MAX_TEXT_BYTES:
        raise TrajectoryError("the header's fields make no sense")
    end = FIXED_BYTES + packed_bytes + _CRC.size
    if end > len(view):
        raise DamagedError(f"the header takes {end} bytes, {len(view)} are there")
    packed = view[FIXED_BYTES : end - _CRC.size]
    if _CRC.unpack_from(view, end - _CRC.size)[0] != zlib.crc32(packed, crc):
        raise DamagedError("the header is damaged: the CRC of its text does not match")
    text = _inflate(packed, plain_bytes)
    try:
        parts = json.loads(text)
        parameters = _parameters(parts, groups)
        settings, architecture = parts["settings"], parts["architecture"]
        dtype, package = parts["dtype"], parts["package"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise TrajectoryError(f"the header's text makes no sense: {error!r}") from None
    texts = [package, *(t for t in (architecture, dtype) if t is not None)]
    if not isinstance(settings, dict) or not all(isinstance(t, str) for t in texts):
        raise TrajectoryError("the header's text makes no sense")
    header = TrajectoryHeader(
        run_seed=run_seed,
        first_step=first_step,
        distribution=decode_choice(DISTRIBUTION_CODES, law, "distribution", TrajectoryError),
        rounding=decode_choice(ROUNDING_CODES, rounding, "rounding", TrajectoryError),
        parameters=parameters,
        num_groups=groups,
        base=base,
        whole=whole if known else None,
        settings=settings,
        architecture=architecture,
        dtype=dtype,
        package=package,
    )
    return header, end


def _inflate(packed: memoryview, size: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(packed, size + 1)
    except zlib.error as error:
        raise TrajectoryError(f"the header's text cannot be unpacked: {error}") from None
    if len(text) != size or not stream.eof or stream.unused_data:
        raise TrajectoryError(f"the header's text should have {size} bytes unpacked")
    return text


def _parameters(parts: Mapping[str, Any], groups: int) -> tuple[Parameter, ...]:
    columns = [parts[key] for key in ("names", "shapes", "dtypes", "groups")]
    if not all(isinstance(column, list) for column in columns):
        raise ValueError("parameters are not lists")
    parameters = []
    for name, shape, dtype, group in zip(*columns, strict=True):
        sizes_fit = all(type(n) is int and n >= 0 for n in shape)
        if not isinstance(name, str) or not sizes_fit or math.prod(shape) > MAX_ELEMENTS:
            raise ValueError(f"parameter {name!r} of shape {shape}")
        if type(group) is not int or not 0 <= group < groups:
            raise ValueError(f"group {group} of {name!r}")
        parameters.append(Parameter(name, tuple(shape), _DTYPES[dtype], group))
    if len({p.name for p in parameters}) != len(parameters):
        raise ValueError("a name is there twice")
    return tuple(parameters)


Tables = zk.ParamTable | Sequence[zk.ParamTable]


def as_tables(tables: Tables) -> tuple[zk.ParamTable, ...]:
    """Returns a table, or several (one a device), as a tuple."""
    parts = (tables,) if isinstance(tables, zk.ParamTable) else tuple(tables)
    groups = sorted({table.num_groups for table in parts})
    if len(groups) != 1:
        raise ValueError(f"expected tables of one num_groups, got {groups}")
    return parts


def parameters_of(tables: Iterable[zk.ParamTable]) -> tuple[Parameter, ...]:
    """Returns what a header tells of the tables' parameters."""
    entries = [entry for table in tables for entry in table.entries]
    for entry in entries:
        if entry.offset:
            raise TrajectoryError(
                f"{entry.name!r} is a shard (offset {entry.offset}); a trajectory is of whole "
                "parameters: gather them first"
            )
    return tuple(Parameter(e.name, tuple(e.tensor.shape), e.tensor.dtype, e.group) for e in entries)


def fingerprint_of(tables: Iterable[zk.ParamTable]) -> int:
    """Returns the fingerprint of all tables together; on one device, that of its table."""
    return sum(map(zk.fingerprint, tables)) % (1 << 64)
