"""How a message lies in bytes: a frame around a payload, and tables of the payload's fields.

A frame is ``magic[4] schema:u16 kind:u8 reserved:u8 length:u32 crc:u32 payload``, little-endian;
``length`` counts the whole frame and ``crc`` is the CRC-32 of everything but itself.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Collection, Mapping
from typing import Any

from zorba.federated.errors import MessageError
from zorba.log import binary
from zorba_kernels.noise import DISTRIBUTION_CODES

MAGIC = b"ZRBM"
SCHEMA = 3  # version of the messages; a decoder refuses every other one
MAX_MESSAGE_BYTES = 1 << 28  # no message is larger, whatever its header says

# Fields that are one of a few words. Their numbers are fixed for good: a new word gets a new one.
CODES: dict[str, Mapping[Any, int]] = {
    "distribution": DISTRIBUTION_CODES,
    "rounding": {"nearest": 0, "stochastic": 1},
    "estimator": {"central": 0, "forward": 1},
    "directions": {"shared": 0, "own": 1},
    "unit": {None: 0, "example": 1, "client": 2},
}

_HEAD = struct.Struct("<4sHBBI")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEAD.size + _CRC.size
_NAME = re.compile(r"[A-Za-z0-9._+-]{1,64}")


def frame(kind: int, payload: bytes) -> bytes:
    """Returns the payload as a message of the kind."""
    head = _HEAD.pack(MAGIC, SCHEMA, kind, 0, HEADER_BYTES + len(payload))
    return head + _CRC.pack(zlib.crc32(payload, zlib.crc32(head))) + payload


def unframe(data: bytes, kinds: Collection[int]) -> tuple[int, Reader]:
    """Returns a message's kind, one of ``kinds``, and a reader of its payload."""
    if not isinstance(data, bytes):
        raise MessageError(f"a message is bytes, got {type(data).__name__}")
    if len(data) < HEADER_BYTES:
        raise MessageError(f"a message has at least {HEADER_BYTES} bytes, got {len(data)}")
    magic, schema, kind, reserved, length = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise MessageError(f"a message starts with {MAGIC!r}, got {magic!r}")
    # Before the CRC: a message of another version is whole, and sending it again would not help.
    if schema != SCHEMA:
        told = f"message schema {schema}, expected {SCHEMA}"
        raise MessageError(f"{told}: install the same package version everywhere")
    if length != len(data) or length > MAX_MESSAGE_BYTES:
        raise MessageError(f"the message says {length} bytes but {len(data)} came: send it again")
    payload = memoryview(data)[HEADER_BYTES:]  # no copy: a plan may carry 64 MiB of the log
    (crc,) = _CRC.unpack_from(data, _HEAD.size)
    if crc != zlib.crc32(payload, zlib.crc32(data[: _HEAD.size])):
        raise MessageError("the message's CRC does not match: it was damaged, send it again")
    if kind not in kinds or reserved != 0:
        raise MessageError(f"message kind {kind} (reserved {reserved}) is unknown")
    return kind, Reader(payload)


class Layout:
    """Writes and reads fields of fixed size: "round:I loss:f" are names and ``struct`` codes.

    Those in ``CODES`` are words outside of the message.
    """

    def __init__(self, what: str, fields: str) -> None:
        self._what = what  # has these fields, for errors
        self._names, codes = zip(*(field.split(":") for field in fields.split()), strict=True)
        self._words = [name for name in self._names if name in CODES]
        self._struct = struct.Struct("<" + "".join(codes))

    def pack(self, values: Mapping[str, Any]) -> bytes:
        """Returns the fields' bytes, or raises MessageError where a value is out of range."""
        numbers = dict(values) | {name: CODES[name].get(values[name]) for name in self._words}
        try:
            return self._struct.pack(*(numbers[name] for name in self._names))
        except (struct.error, OverflowError, TypeError) as error:
            raise MessageError(f"{self._what} cannot be encoded: {error}") from None

    def unpack(self, reader: Reader) -> dict[str, Any]:
        """Takes the fields off a payload, by name; raises MessageError where they are cut."""
        # Sizes come before values: the reader compares them with what is left.
        values = dict(zip(self._names, reader.unpack(self._struct, self._what), strict=True))
        for name in self._words:
            values[name] = binary.decode_choice(CODES[name], values[name], name, MessageError)
        return values


class Reader(binary.Reader):
    """Takes values off the front of a payload."""

    error = MessageError

    def text(self, what: str) -> str:
        """Takes a name: its length (u8), then 1 to 64 letters, digits and ``._+-``."""
        data = bytes(self.raw(self.raw(1, what)[0], what))
        return check_name(data.decode("latin-1"), what)


def check_name(value: str, what: str) -> str:
    """Returns value, or raises MessageError when it is not a name."""
    # Names end up in paths of files and on terminals: nothing but these characters may pass.
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise MessageError(f"{what} must be 1 to 64 letters, digits and ._+-, got {value!r}")
    return value


def pack_name(value: str, what: str) -> bytes:
    """Returns a name as ``Reader.text`` takes it."""
    data = check_name(value, what).encode("ascii")
    return bytes([len(data)]) + data
