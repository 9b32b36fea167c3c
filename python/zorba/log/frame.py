"""Frames: how a record lies in the file, so that a torn or changed one is told.

A frame is ``length:varint body crc:u32``. The CRC is that of the frame's offset in the file (u64),
the length and the body, continued from ``salt``, which is the CRC that ends the header: a frame
that was moved, or that is another file's, does not pass.
"""

from __future__ import annotations

import struct
import zlib

from zorba.log.binary import Reader
from zorba.log.errors import DamagedError, TrajectoryError

MAX_BODY_BYTES = 1 << 26

_OFFSET = struct.Struct("<Q")
_CRC = struct.Struct("<I")
_LENGTH_BYTES = 4  # of a length below 2**28


class BodyReader(Reader):
    """Takes values off the front of a body."""

    error = TrajectoryError

    def varint(self, what: str) -> int:
        """Takes an unsigned LEB128 number below 2**63, in its shortest form."""
        value = 0
        for shift in range(0, 63, 7):
            byte = self.raw(1, what)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if byte == 0 and shift:
                    break
                return value
        raise self.error(f"{what} is no number")


def varint(value: int) -> bytes:
    """Returns what ``BodyReader.varint`` takes: 7 bits a byte, low ones first."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def frame(body: bytes, offset: int, salt: int) -> bytes:
    """Returns the frame of a body that will stand at ``offset``."""
    if len(body) > MAX_BODY_BYTES:
        raise TrajectoryError(f"a step of {len(body)} bytes; at most {MAX_BODY_BYTES} are served")
    data = varint(len(body)) + body
    return data + _CRC.pack(_checksum(data, offset, salt))


def unframe(view: memoryview, offset: int, salt: int) -> tuple[memoryview, int]:
    """Checks the frame at ``offset``.

    Returns:
        Its body, and where the frame ends.

    Raises:
        DamagedError: there is no whole, unchanged frame.
    """
    reader = BodyReader(view[offset : offset + _LENGTH_BYTES])
    before = reader.left
    try:
        length = reader.varint("the length of a record")
    except TrajectoryError as error:
        raise DamagedError(str(error)) from None
    start = offset + before - reader.left
    end = start + length + _CRC.size
    if not 1 <= length <= MAX_BODY_BYTES or end > len(view):
        raise DamagedError(f"a record says {length} bytes, {len(view) - start} are left")
    (crc,) = _CRC.unpack_from(view, start + length)
    if crc != _checksum(view[offset : start + length], offset, salt):
        raise DamagedError("the CRC of a record does not match")
    return view[start : start + length], end


def frame_after(view: memoryview, offset: int, salt: int) -> bool:
    """Whether a whole frame starts anywhere after ``offset``."""
    for at in range(offset + 1, len(view)):
        try:
            unframe(view, at, salt)
            return True
        except DamagedError:
            continue
    return False


def _checksum(data: bytes | memoryview, offset: int, salt: int) -> int:
    return zlib.crc32(data, zlib.crc32(_OFFSET.pack(offset), salt))
