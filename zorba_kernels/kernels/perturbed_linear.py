"""y[r, t] += scale[r] * (x[r, t] . v) * u: rank-one noise of each row of a batch, in Triton."""

import triton
import triton.language as tl

from zorba_kernels.kernels.add_noise import load, store
from zorba_kernels.kernels.noise import (
    CALL,
    COLUMN_DOMAIN,
    FLOAT32,
    ROW_DOMAIN,
    as_bits,
    as_float,
    round_nearest,
    sign_words,
    widen,
)


@triton.jit
def signs(
    start, domain, stream_lo, stream_hi, sample, seed_lo, seed_hi, PIECE: tl.constexpr,
):  # fmt: skip
    """Signs of rows or columns [start, start + PIECE), in bit 31; whole calls."""
    call = tl.arange(0, PIECE // CALL).to(tl.uint32) + domain + start // CALL
    words = sign_words(call, stream_lo, stream_hi, sample, seed_lo, seed_hi)
    bits = words[:, None] << (31 - tl.arange(0, 32))[None, :].to(tl.uint32)
    return tl.reshape(bits, [PIECE]) & 0x80000000


@triton.jit(
    do_not_specialize=[
        "x", "y", "samples", "scale", "tokens", "inputs", "outputs", "seed_lo", "seed_hi",
        "stream_lo", "stream_hi",
    ]
)  # fmt: skip
def perturbed_linear(
    x: "i64", y: "i64", samples: "*i64", scale: "*fp32", tokens: "i64", inputs: "i32",
    outputs: "i32", seed_lo: "u32", seed_hi: "u32", stream_lo: "u32", stream_hi: "u32",
    DTYPE: tl.constexpr, HAS_X: tl.constexpr, TRANSPOSED: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """A program is a token; x and y are addresses of [rows, tokens, inputs] and [.., outputs]."""
    seed_lo = seed_lo.to(tl.uint32)
    seed_hi = seed_hi.to(tl.uint32)
    stream_lo = stream_lo.to(tl.uint32)
    stream_hi = stream_hi.to(tl.uint32)
    U: tl.constexpr = COLUMN_DOMAIN if TRANSPOSED else ROW_DOMAIN
    V: tl.constexpr = ROW_DOMAIN if TRANSPOSED else COLUMN_DOMAIN
    SIZE: tl.constexpr = 4 if DTYPE == FLOAT32 else 2
    token = tl.program_id(0).to(tl.int64)
    row = token // tokens
    sample = tl.load(samples + row).to(tl.uint32)
    size = tl.load(scale + row)
    if size != 0.0:
        if HAS_X:
            source = x + token * inputs * SIZE
            total = tl.zeros([PIECE], tl.float32)
            for start in range(0, inputs, PIECE):
                at = start + tl.arange(0, PIECE)
                value = widen(load(source, at, 0, inputs, DTYPE, False), DTYPE)
                sign = signs(start, V, stream_lo, stream_hi, sample, seed_lo, seed_hi, PIECE)
                total += as_float(as_bits(value) ^ sign)
            size = size * tl.sum(total, 0)
        target = y + token * outputs * SIZE
        for start in range(0, outputs, PIECE):
            at = start + tl.arange(0, PIECE)
            value = widen(load(target, at, 0, outputs, DTYPE, False), DTYPE)
            sign = signs(start, U, stream_lo, stream_hi, sample, seed_lo, seed_hi, PIECE)
            value += as_float(as_bits(size) ^ sign)
            store(target, at, round_nearest(value, DTYPE), 0, outputs, DTYPE, False)
