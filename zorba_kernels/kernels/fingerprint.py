"""64-bit hash of the exact bits of a table. Sums of integers: any order gives the same result."""

import triton
import triton.language as tl

from zorba_kernels.kernels.noise import FLOAT32
from zorba_kernels.kernels.tables import FIELDS, find_segment

STEP = tl.constexpr(0x9E3779B97F4A7C15)  # between the keys of neighbouring lanes


@triton.jit
def mix(x):
    """Finaliser of MurmurHash3 (Appleby, public domain): a bijection of uint64."""
    x ^= x >> 33
    x *= 0xFF51AFD7ED558CCD
    x ^= x >> 33
    x *= 0xC4CEB9FE1A85EC53
    return x ^ (x >> 33)


@triton.jit
def load_lanes(src, lane, halves, WHOLE: tl.constexpr):
    """8 bytes at each lane, as uint64, low bytes first; zeros from ``halves`` 16-bit words on."""
    if WHOLE:
        pointer = tl.multiple_of(src.to(tl.pointer_type(tl.int64)), 16)
        bytes_ = tl.load(pointer + lane).to(tl.uint64)
    else:
        pointer = src.to(tl.pointer_type(tl.int16))
        bytes_ = tl.zeros_like(lane).to(tl.uint64)
        for i in tl.static_range(4):
            at = 4 * lane + i
            half = tl.load(pointer + at, at < halves, 0).to(tl.uint16, bitcast=True)
            bytes_ |= half.to(tl.uint64) << (16 * i)
    return bytes_


@triton.jit(do_not_specialize=["segments", "ends", "count", "tiles", "result"])
def fingerprint(
    segments: "*i64", ends: "*i64", count: "i32", tiles: "i64", result: "*i64",
    TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Adds the hashes of all headers and lanes to ``result``, modulo 2^64.

    A piece of work is TILE elements of a segment, counted from its first one. There are as many
    pieces as tiles, of which the last may be empty: tiles are aligned in the whole parameter.
    """
    # A sum a lane, added up once at the end: a reduction a tile would cost more than its hashes.
    total = tl.zeros([LANES], tl.uint64)
    for header_row in range(tl.program_id(0) * LANES, count, tl.num_programs(0) * LANES):
        at = header_row + tl.arange(0, LANES)
        row = segments + at * FIELDS
        numel = tl.load(row + 2, at < count, 0)
        stream = tl.load(row + 4, at < count, 0)
        dtype = tl.load(row + 5, at < count, 0)
        header = mix(((numel << 2 | dtype) ^ stream).to(tl.uint64))
        total += tl.where(at < count, header, 0)
    at = tl.full([], 0, tl.int64)
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        at = find_segment(ends, count, tile, at)
        row = segments + at * FIELDS
        src = tl.load(row)
        numel = tl.load(row + 2)
        stream = tl.load(row + 4).to(tl.uint64)
        each = tl.where(tl.load(row + 5) == FLOAT32, 2, 1)  # 16-bit words of an element
        first = (tile - tl.load(ends + at - 1, at > 0, 0)) * TILE
        halves = numel * each
        low = first * each // 4
        high = tl.minimum(first + TILE, numel) * each
        # Lanes that are whole and aligned are loaded at once, the rest by halves.
        whole = low + (high - tl.minimum(low * 4, high)) // (4 * LANES) * LANES
        if src % 16 != 0:
            whole = low
        for start in range(low, whole, LANES):
            lane = tl.cast(start, tl.int64) + tl.arange(0, LANES)
            key = stream + STEP * (lane + 1).to(tl.uint64)
            total += mix(load_lanes(src, lane, halves, True) ^ key)
        for start in range(whole, (high + 3) // 4, LANES):
            lane = tl.cast(start, tl.int64) + tl.arange(0, LANES)
            key = stream + STEP * (lane + 1).to(tl.uint64)
            total += tl.where(lane * 4 < high, mix(load_lanes(src, lane, halves, False) ^ key), 0)
    # Wraps modulo 2^64 in whatever order the programs end.
    tl.atomic_add(result, tl.sum(total, 0).to(tl.int64))
