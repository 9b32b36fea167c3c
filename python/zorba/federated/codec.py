"""Frames of messages, and a reader that checks sizes before it takes anything.

A frame is ``magic[4] schema:u16 kind:u8 reserved:u8 length:u32 crc:u32 payload``, little-endian;
``length`` counts the whole frame and ``crc`` is the CRC-32 of everything but itself.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zorba.federated.errors import MessageError

MAGIC = b"ZRBM"
SCHEMA = 1
"""Version of the message schema; a decoder refuses every other one."""

MAX_MESSAGE_BYTES = 1 << 28
"""No message is larger, whatever its header says."""

_HEAD = struct.Struct("<4sHBBI")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEAD.size + _CRC.size
_NAME = re.compile(r"[A-Za-z0-9._+-]{1,64}")


def frame(kind: int, payload: bytes) -> bytes:
    """Returns the payload as a message of the kind."""
    length = HEADER_BYTES + len(payload)
    if length > MAX_MESSAGE_BYTES:
        raise MessageError(f"a message of {length} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    head = _HEAD.pack(MAGIC, SCHEMA, kind, 0, length)
    return head + _CRC.pack(zlib.crc32(payload, zlib.crc32(head))) + payload


def unframe(data: bytes, kinds: Sequence[int]) -> tuple[int, Reader]:
    """Checks a frame.

    Args:
        data: the message.
        kinds: those that are known.

    Returns:
        Its kind, and a reader of its payload.

    Raises:
        MessageError: it is not a whole, undamaged message of a known kind and this schema.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise MessageError(f"a message is bytes, got {type(data).__name__}")
    view = memoryview(data).cast("B") if isinstance(data, memoryview) else memoryview(data)
    if len(view) < HEADER_BYTES:
        raise MessageError(f"a message has at least {HEADER_BYTES} bytes, got {len(view)}")
    magic, schema, kind, reserved, length = _HEAD.unpack_from(view)
    if magic != MAGIC:
        raise MessageError(f"a message starts with {MAGIC!r}, got {bytes(magic)!r}")
    if schema != SCHEMA:
        raise MessageError(
            f"message schema {schema}, expected {SCHEMA}: install the same package version "
            "everywhere"
        )
    if length != len(view) or length > MAX_MESSAGE_BYTES:
        raise MessageError(f"the message says {length} bytes but {len(view)} came: send it again")
    (crc,) = _CRC.unpack_from(view, _HEAD.size)
    if crc != zlib.crc32(view[HEADER_BYTES:], zlib.crc32(view[: _HEAD.size])):
        raise MessageError("the message's CRC does not match: it was damaged, send it again")
    if kind not in kinds or reserved != 0:
        raise MessageError(f"message kind {kind} (reserved {reserved}) is unknown")
    return kind, Reader(view[HEADER_BYTES:])


class Reader:
    """Takes values off the front of a payload; every take is checked against what is left."""

    def __init__(self, view: memoryview) -> None:
        """``view`` is only read, and values are copied out of it."""
        self._view = view
        self._at = 0

    def raw(self, count: int, what: str) -> memoryview:
        """Takes ``count`` bytes."""
        left = len(self._view) - self._at
        if count > left:
            raise MessageError(f"{what} needs {count} bytes but {left} are left")
        self._at += count
        return self._view[self._at - count : self._at]

    def unpack(self, layout: struct.Struct, what: str) -> tuple[Any, ...]:
        """Takes the fields of ``layout``."""
        return layout.unpack(self.raw(layout.size, what))

    def array(self, dtype: str, count: int, what: str) -> npt.NDArray[Any]:
        """Takes ``count`` numbers of the little-endian ``dtype`` and returns a copy of them."""
        kind = np.dtype(dtype)
        return np.frombuffer(self.raw(count * kind.itemsize, what), dtype=kind).copy()

    def text(self, what: str) -> str:
        """Takes a name: its length (u8), then 1 to 64 letters, digits and ``._+-``."""
        data = bytes(self.raw(self.raw(1, what)[0], what))
        return check_name(data.decode("latin-1"), what)

    def rest(self) -> memoryview:
        """Takes everything that is left."""
        return self.raw(len(self._view) - self._at, "the rest")

    def end(self) -> None:
        """Raises MessageError unless everything was taken."""
        left = len(self._view) - self._at
        if left:
            raise MessageError(f"{left} bytes follow the end of the message")


def check_name(value: str, what: str) -> str:
    """Returns value, or raises MessageError when it is no name."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise MessageError(f"{what} must be 1 to 64 letters, digits and ._+-, got {value!r}")
    return value


def pack_name(value: str, what: str) -> bytes:
    """Returns a name as ``Reader.text`` takes it."""
    data = check_name(value, what).encode("ascii")
    return bytes([len(data)]) + data


def pack_checked(layout: struct.Struct, what: str, *values: Any) -> bytes:
    """Returns packed fields, or raises MessageError when one is out of its range."""
    try:
        return layout.pack(*values)
    except (struct.error, OverflowError, TypeError) as error:
        raise MessageError(f"{what} cannot be encoded: {error}") from None


DISTRIBUTION_CODES = {"gaussian": 0, "rademacher": 1}
ROUNDING_CODES = {"nearest": 0, "stochastic": 1}
ESTIMATOR_CODES = {"central": 0, "forward": 1}


def decode_choice(codes: dict[str, int], code: int, what: str) -> Any:
    """Returns the name of a code, or raises MessageError for one that nobody gave."""
    for name, known in codes.items():
        if known == code:
            return name
    raise MessageError(f"{what} has the unknown code {code}; known are {codes}")
