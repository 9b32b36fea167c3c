"""How a message lies in bytes: a frame around a payload, and tables of the payload's fields.

A frame is ``magic[4] schema:u16 kind:u8 reserved:u8 length:u32 crc:u32 payload``, little-endian;
``length`` counts the whole frame and ``crc`` is the CRC-32 of everything but itself.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from zorba.federated.errors import MessageError
from zorba.log import binary
from zorba_kernels.noise import DISTRIBUTION_CODES

MAGIC = b"ZRBM"
SCHEMA = 2
"""Version of the message schema; a decoder refuses every other one."""

MAX_MESSAGE_BYTES = 1 << 28
"""No message is larger, whatever its header says."""

# Numbers in messages are fixed for good: a new word gets a new one.
CODES: dict[str, Mapping[Any, int]] = {
    "distribution": DISTRIBUTION_CODES,
    "rounding": {"nearest": 0, "stochastic": 1},
    "estimator": {"central": 0, "forward": 1},
    "unit": {None: 0, "example": 1, "client": 2},
}
"""Fields that are one of a few words, by name: the number of each word in a message."""

_HEAD = struct.Struct("<4sHBBI")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEAD.size + _CRC.size
_NAME = re.compile(r"[A-Za-z0-9._+-]{1,64}")


def frame(kind: int, payload: bytes) -> bytes:
    """Returns the payload as a message of the kind."""
    # Checked by the sender too: a message that nobody takes would be sent again and again.
    length = HEADER_BYTES + len(payload)
    if length > MAX_MESSAGE_BYTES:
        raise MessageError(f"a message of {length} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    head = _HEAD.pack(MAGIC, SCHEMA, kind, 0, length)
    return head + _CRC.pack(zlib.crc32(payload, zlib.crc32(head))) + payload


def unframe(data: bytes, kinds: Sequence[int]) -> tuple[int, Reader]:
    """Returns a message's kind and a reader of its payload.

    Raises:
        MessageError: it is not a whole, undamaged message of this schema and one of ``kinds``.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise MessageError(f"a message is bytes, got {type(data).__name__}")
    # A view, not a copy: a plan may carry 64 MiB of the log.
    view = memoryview(data).cast("B") if isinstance(data, memoryview) else memoryview(data)
    if len(view) < HEADER_BYTES:
        raise MessageError(f"a message has at least {HEADER_BYTES} bytes, got {len(view)}")
    magic, schema, kind, reserved, length = _HEAD.unpack_from(view)
    if magic != MAGIC:
        raise MessageError(f"a message starts with {MAGIC!r}, got {bytes(magic)!r}")
    # Before the CRC: a message of another version is whole, and "install" helps where "send again"
    # does not.
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


class Layout:
    """Fields of fixed size in their order; it writes them and reads them.

    Args:
        what: has these fields, for errors.
        fields: names, each with its code of the module ``struct``: "round:I loss:f". Fields in
            ``CODES`` are words outside of the message.
    """

    def __init__(self, what: str, fields: str) -> None:
        self._what = what
        self._names, codes = zip(*(field.split(":") for field in fields.split()), strict=True)
        self._words = tuple(name for name in self._names if name in CODES)
        self._struct = struct.Struct("<" + "".join(codes))

    def pack(self, values: Mapping[str, Any]) -> bytes:
        """Returns the fields' bytes, or raises MessageError where a value is out of range."""
        numbers = {name: CODES[name].get(values[name]) for name in self._words}
        try:
            return self._struct.pack(*(numbers.get(n, values[n]) for n in self._names))
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
