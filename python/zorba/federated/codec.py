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

from zorba.federated.errors import MessageError
from zorba.log import binary

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


class Reader(binary.Reader):
    """Takes values off the front of a payload."""

    error = MessageError

    def text(self, what: str) -> str:
        """Takes a name: its length (u8), then 1 to 64 letters, digits and ``._+-``."""
        data = bytes(self.raw(self.raw(1, what)[0], what))
        return check_name(data.decode("latin-1"), what)


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


ESTIMATOR_CODES = {"central": 0, "forward": 1}


def decode_choice(codes: dict[str, int], code: int, what: str) -> Any:
    """Returns the name of a code, or raises MessageError for one that nobody gave."""
    return binary.decode_choice(codes, code, what, MessageError)
