"""w <- round(w - decay * w + sum_k coef[group, k] * z(seed_k, stream, sample_k, .)), in Triton.

One persistent launch for all the segments of a table that have one dtype: a program takes a tile at
a time, and of it a strip at a time, whose weights stay in registers from the first term to the
last. A strip has two halves in turns of 32 blocks, because blocks 32 apart share their rounding
words: both then lie in one thread, with the 16-byte accesses of a warp side by side.
"""

import triton
import triton.language as tl

from zorba_kernels.kernels.noise import (
    BLOCK,
    CALL,
    FLOAT32,
    GAUSSIAN,
    RANK1,
    ROUNDING_DOMAIN,
    as_bits,
    as_float,
    gaussian,
    philox,
    rank1_words,
    round_nearest,
    round_stochastic,
    rounding_bits,
    rounding_dither,
    rounding_start,
    sign_bits,
    sign_bytes,
    sign_words,
    widen,
    words_of,
)
from zorba_kernels.kernels.tables import FIELDS, find_segment

PAIR = tl.constexpr(64)  # blocks after which the halves take turns again


@triton.jit
def load(base, at, low, high, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Elements ``at`` [n, 8] after the address ``base``, as stored; 0 outside [low, high)."""
    # Bits, not floats: what is left alone must not pass through a conversion.
    if DTYPE == FLOAT32:
        pointer = base.to(tl.pointer_type(tl.int32))
    else:
        pointer = base.to(tl.pointer_type(tl.int16))
    if WHOLE:
        stored = tl.load(tl.multiple_of(pointer, 16) + at)
    else:
        stored = tl.load(pointer + at, (at >= low) & (at < high), 0)
    return stored


@triton.jit
def store(base, at, stored, low, high, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """The way back."""
    if DTYPE == FLOAT32:
        pointer = base.to(tl.pointer_type(tl.int32))
    else:
        pointer = base.to(tl.pointer_type(tl.int16))
    if WHOLE:
        tl.store(tl.multiple_of(pointer, 16) + at, stored)
    else:
        tl.store(pointer + at, stored, (at >= low) & (at < high))


@triton.jit
def begin_round(
    stored, first, second, decay,
    DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr, DECAYS: tl.constexpr,
):  # fmt: skip
    """What the sum of a round starts from, before its first term."""
    # The dither is part of the sum, so that it is added in the one order of the contract.
    weight = widen(stored, DTYPE)
    if STOCHASTIC:
        total = rounding_start(weight, rounding_dither(first, second)[:, None], DTYPE)
    else:
        total = tl.zeros_like(weight)
    if DECAYS:
        # Where there is no decay the start stays: weight * 0 is NaN for an infinite weight.
        total = tl.where(decay != 0.0, tl.fma(weight, -decay, total), total)
    return total


@triton.jit
def end_round(stored, total, first, second, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """The rounded sum of weight and total, as stored."""
    # The weight is widened again, not kept: registers are what limits the warps.
    value = widen(stored, DTYPE) + total
    if STOCHASTIC:
        result = round_stochastic(value, rounding_bits(first, second), DTYPE)
    else:
        result = round_nearest(value, DTYPE)
    return result


@triton.jit
def signed(bytes_, coef):
    """+-coef: the product with z is exact, so this is what a fused multiply-add would add."""
    return as_float(as_bits(coef) ^ sign_bits(bytes_))


@triton.jit
def add_term(
    total0, total1, block0, first_block, columns,
    stream_lo, stream_hi, sample, seed_lo, seed_hi, coef,
    DISTRIBUTION: tl.constexpr, FRESH: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Adds coef * z to the sums of both halves of a strip; FRESH: they are 0 so far."""
    if DISTRIBUTION == GAUSSIAN:
        z0 = gaussian(block0, stream_lo, stream_hi, sample, seed_lo, seed_hi)
        z1 = gaussian(block0 + PAIR // 2, stream_lo, stream_hi, sample, seed_lo, seed_hi)
        total0 = tl.fma(z0, coef, total0)
        total1 = tl.fma(z1, coef, total1)
    else:
        if DISTRIBUTION == RANK1:
            word = first_block.to(tl.int64) // 4 + tl.arange(0, STRIP // 32)
            words = rank1_words(word, columns, stream_lo, stream_hi, sample, seed_lo, seed_hi)
        else:
            call = first_block // (CALL // BLOCK) + tl.arange(0, STRIP // CALL).to(tl.uint32)
            words = sign_words(call, stream_lo, stream_hi, sample, seed_lo, seed_hi)
        # Four words serve 16 blocks: two of those half a pair, each of the words 4 blocks.
        halves = tl.reshape(words, [STRIP // (PAIR * BLOCK), 2, PAIR // 8])
        words0, words1 = tl.split(tl.permute(halves, [0, 2, 1]))
        bytes0 = sign_bytes(tl.reshape(words0, [STRIP // (8 * BLOCK)]))
        bytes1 = sign_bytes(tl.reshape(words1, [STRIP // (8 * BLOCK)]))
        if FRESH:
            total0 = signed(bytes0, coef)
            total1 = signed(bytes1, coef)
        else:
            total0 += signed(bytes0, coef)
            total1 += signed(bytes1, coef)
    return total0, total1


@triton.jit
def change_strip(
    src, dst, strip, begin, end, stream_lo, stream_hi, group, columns,
    seed_lo, seed_hi, sample, rounding_lo, rounding_hi, coef, decay,
    seeds, samples, coefs, decays, round_ends, rounding_seeds, terms, rounds,
    DTYPE: tl.constexpr, DISTRIBUTION: tl.constexpr, STOCHASTIC: tl.constexpr, MANY: tl.constexpr,
    DECAYS: tl.constexpr, STRIP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """All rounds on the elements [begin, end) of a strip.

    ``src`` and ``dst`` are the addresses of the parameter's element 0, were it all there. WHOLE:
    the strip is whole, and aligned to 16 bytes in both.
    """
    # Blocks 32 apart share a rounding call, so both halves have one set of words.
    pair = tl.arange(0, STRIP // (2 * BLOCK))
    half0 = pair // (PAIR // 2) * PAIR + pair % (PAIR // 2)
    at0 = half0[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    at1 = at0 + PAIR // 2 * BLOCK
    start = tl.cast(strip, tl.int64) * STRIP  # the interpreter counts with plain integers
    low = tl.maximum(begin - start, 0).to(tl.int32)
    high = tl.minimum(end - start, STRIP).to(tl.int32)
    shift = start * (4 if DTYPE == FLOAT32 else 2)
    stored0 = load(src + shift, at0, low, high, DTYPE, WHOLE)
    stored1 = load(src + shift, at1, low, high, DTYPE, WHOLE)

    first_block = (start // BLOCK).to(tl.uint32)
    block0 = first_block + half0.to(tl.uint32)
    call = first_block // 2 + pair.to(tl.uint32)  # of the rounding words
    if MANY:
        stop = 0
        for r in range(rounds):
            if STOCHASTIC:
                rounding_lo, rounding_hi = words_of(tl.load(rounding_seeds + r))
                w0, w1, w2, w3 = philox(
                    call, stream_lo, stream_hi, ROUNDING_DOMAIN, rounding_lo, rounding_hi
                )
            else:
                w0, w1, w2, w3 = call, call, call, call
            decay = tl.load(decays + group * rounds + r)
            total0 = begin_round(stored0, w0, w1, decay, DTYPE, STOCHASTIC, True)
            total1 = begin_round(stored1, w2, w3, decay, DTYPE, STOCHASTIC, True)
            # A round that leaves the group alone must not round it: NaN payloads would change.
            changed = decay != 0.0
            first = stop
            stop = tl.load(round_ends + r).to(tl.int32)
            for k in range(first, stop):
                coef = tl.load(coefs + group * terms + k)
                if coef != 0.0:
                    changed = True
                    seed_lo, seed_hi = words_of(tl.load(seeds + k))
                    total0, total1 = add_term(
                        total0, total1, block0, first_block, columns, stream_lo, stream_hi,
                        tl.load(samples + k).to(tl.uint32), seed_lo, seed_hi, coef,
                        DISTRIBUTION, False, STRIP,
                    )  # fmt: skip
            if changed:
                stored0 = end_round(stored0, total0, w0, w1, DTYPE, STOCHASTIC)
                stored1 = end_round(stored1, total1, w2, w3, DTYPE, STOCHASTIC)
    else:
        w0, w1, w2, w3 = call, call, call, call
        if STOCHASTIC:
            w0, w1, w2, w3 = philox(
                call, stream_lo, stream_hi, ROUNDING_DOMAIN, rounding_lo, rounding_hi
            )
        total0 = begin_round(stored0, w0, w1, decay, DTYPE, STOCHASTIC, DECAYS)
        total1 = begin_round(stored1, w2, w3, decay, DTYPE, STOCHASTIC, DECAYS)
        total0, total1 = add_term(
            total0, total1, block0, first_block, columns,
            stream_lo, stream_hi, sample, seed_lo, seed_hi, coef,
            DISTRIBUTION, not (STOCHASTIC or DECAYS), STRIP,
        )  # fmt: skip
        stored0 = end_round(stored0, total0, w0, w1, DTYPE, STOCHASTIC)
        stored1 = end_round(stored1, total1, w2, w3, DTYPE, STOCHASTIC)
    store(dst + shift, at0, stored0, low, high, DTYPE, WHOLE)
    store(dst + shift, at1, stored1, low, high, DTYPE, WHOLE)


# Types are given and values not specialised on, so that no argument leads to another compilation.
@triton.jit(
    do_not_specialize=[
        "segments", "ends", "count", "tiles", "seed_lo", "seed_hi", "sample", "rounding_lo",
        "rounding_hi", "coef", "decay", "grouped", "seeds", "samples", "coefs", "decays",
        "round_ends", "rounding_seeds", "terms", "rounds",
    ]
)  # fmt: skip
def add_noise(
    segments: "*i64", ends: "*i64", count: "i32", tiles: "i64",
    seed_lo: "u32", seed_hi: "u32", sample: "u32", rounding_lo: "u32", rounding_hi: "u32",
    coef: "fp32", decay: "fp32", grouped: "i32",
    seeds: "*i64", samples: "*i64", coefs: "*fp32", decays: "*fp32",
    round_ends: "*i64", rounding_seeds: "*i64", terms: "i32", rounds: "i32",
    DTYPE: tl.constexpr, DISTRIBUTION: tl.constexpr, STOCHASTIC: tl.constexpr, MANY: tl.constexpr,
    DECAYS: tl.constexpr, TILE: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """All rounds on the segments of a table, which have the one dtype.

    One round of one term (not MANY): its seeds are arguments, and so are coef and decay, unless
    ``grouped`` says that each group has its own in ``coefs`` and ``decays``; a group whose coef is
    0 is left out. Otherwise all of the program is in device memory, as ``DeviceProgram`` lays it
    out. DECAYS: some decay is not zero.
    """
    # The interpreter types integers by their value, not by the annotation.
    seed_lo = seed_lo.to(tl.uint32)
    seed_hi = seed_hi.to(tl.uint32)
    sample = sample.to(tl.uint32)
    rounding_lo = rounding_lo.to(tl.uint32)
    rounding_hi = rounding_hi.to(tl.uint32)
    coef = tl.full([], coef, tl.float32)
    decay = tl.full([], decay, tl.float32)
    SIZE: tl.constexpr = 4 if DTYPE == FLOAT32 else 2
    at = tl.full([], 0, tl.int64)
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        at = find_segment(ends, count, tile, at)
        row = segments + at * FIELDS
        numel = tl.load(row + 2)
        offset = tl.load(row + 3)
        stream_lo, stream_hi = words_of(tl.load(row + 4))
        group = tl.load(row + 6)
        columns = tl.load(row + 7)
        src = tl.load(row) - offset * SIZE
        dst = tl.load(row + 1) - offset * SIZE
        start = (offset // TILE + tile - tl.load(ends + at - 1, at > 0, 0)) * TILE
        begin = tl.maximum(offset, start)
        end = tl.minimum(offset + numel, start + TILE)
        # A group's own coefficient is one load a tile, not one a strip.
        tile_coef = coef
        tile_decay = decay
        if grouped != 0:
            tile_coef = tl.load(coefs + group)
            tile_decay = tl.load(decays + group)

        # Strips [first, last) are whole and aligned, the others of [touched, until) are not.
        touched = begin // STRIP
        until = (end + STRIP - 1) // STRIP
        first = (begin + STRIP - 1) // STRIP
        last = end // STRIP
        if ((src | dst) % 16 != 0) | (last < first):
            last = first
        if tile_coef == 0.0:  # nothing to add: the host has made sure that nothing else is left
            until = touched
            last = first
        for strip in range(first, last):
            change_strip(
                src, dst, strip, begin, end, stream_lo, stream_hi, group, columns,
                seed_lo, seed_hi, sample, rounding_lo, rounding_hi, tile_coef, tile_decay,
                seeds, samples, coefs, decays, round_ends, rounding_seeds, terms, rounds,
                DTYPE, DISTRIBUTION, STOCHASTIC, MANY, DECAYS, STRIP, True,
            )  # fmt: skip
        for i in range(touched, until - (last - first)):
            strip = tl.where(i < first, i, i + (last - first))
            change_strip(
                src, dst, strip, begin, end, stream_lo, stream_hi, group, columns,
                seed_lo, seed_hi, sample, rounding_lo, rounding_hi, tile_coef, tile_decay,
                seeds, samples, coefs, decays, round_ends, rounding_seeds, terms, rounds,
                DTYPE, DISTRIBUTION, STOCHASTIC, MANY, DECAYS, STRIP, False,
            )  # fmt: skip
