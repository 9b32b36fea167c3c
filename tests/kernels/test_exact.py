"""The oracle against a second implementation, from the words of docs/noise.md, in exact fractions.

Slow and obvious: no torch, no float arithmetic. Every rounding is written out, so that a mistake in
the fast forms, or in the software FMA that they share, shows up against it.
"""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

import zorba_kernels as zk
from tests.kernels.bits import changed
from zorba_kernels.backends import reference
from zorba_kernels.noise import philox4x32

# --- The contract in fractions -------------------------------------------------------------------

MASK32 = 0xFFFFFFFF


def float_of(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def bits_of_float(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def to_grid(value: Fraction, digits: int = 24, lowest: int = -149, top: int = 128) -> float:
    """Rounds to the nearest number of a binary format, ties to even; float32 by default."""
    if value == 0:
        return 0.0
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    step = Fraction(2) ** max(exponent - digits + 1, lowest)
    rounded = round(size / step) * step  # round() of a Fraction is half to even
    result = float("inf") if rounded >= Fraction(2) ** top else float(rounded)
    return result if value > 0 else -result


def fma(a: float, b: float, c: float) -> float:
    return to_grid(Fraction(a) * Fraction(b) + Fraction(c))


def add(a: float, b: float) -> float:
    return to_grid(Fraction(a) + Fraction(b))


def multiply(a: float, b: float) -> float:
    return to_grid(Fraction(a) * Fraction(b))


def words(block: int, seed: int, stream: int, sample: int) -> tuple[int, int, int, int]:
    counter = (block, stream & MASK32, stream >> 32, sample)
    return philox4x32(counter, (seed & MASK32, seed >> 32))


def box_muller(word: int) -> tuple[float, float]:
    """Two normals from a word: docs/noise.md, Gaussian."""
    h = float.fromhex
    u = (word & 0xFFFF) + 0.5
    mantissa = float_of(bits_of_float(u) & 0x7FFFFF | 0x3F800000)
    g = fma(mantissa, h("0x1.43e25cp-4"), h("-0x1.42d802p-1"))
    g = fma(mantissa, g, h("0x1.0b7faap+1"))
    g = fma(mantissa, g, h("-0x1.8553ecp+1"))
    pattern = to_grid(Fraction(bits_of_float(u)))
    line = fma(pattern, -(2.0**-23), float_of(0x431080D0))
    s = fma(mantissa, g, line)
    y = float_of(0x5F3759DF - (bits_of_float(s) >> 1))
    t = multiply(s, y)
    v = multiply(t, y)
    p = fma(v, fma(v, h("0x1.808ae0p-2"), h("-0x1.408d50p+0")), h("0x1.e06a9cp+0"))
    r = multiply(t, p) * (-1.0 if word >> 31 else 1.0)
    x = ((word >> 16) & 0x7FFF) + 0.5 - 2.0**14
    xx = multiply(x, x)
    c = fma(xx, h("-0x1.705eaep-90"), h("0x1.308724p-58"))
    c = fma(xx, c, h("-0x1.73cb0cp-28"))
    c = fma(xx, c, h("0x1.2d6a3ap+0"))
    d = fma(xx, h("0x1.5a8fa8p-74"), h("-0x1.83166cp-43"))
    d = fma(xx, d, h("0x1.d95234p-14"))
    return multiply(r, c), multiply(r, multiply(x, d))


def gaussian(index: int, seed: int, stream: int, sample: int) -> float:
    word = words(index // 8, seed, stream, sample)[index % 8 // 2]
    return box_muller(word)[index % 2]


def rademacher(index: int, seed: int, stream: int, sample: int) -> float:
    word = words(index // 128, seed, stream, sample)[index % 128 // 32]
    return -1.0 if word >> index % 32 & 1 else 1.0


def rank1_sign(index: int, seed: int, stream: int, sample: int) -> float:
    """u[index] of a noise; that of one dimension is u."""
    word = words(index // 128 + (3 << 30), seed, stream, sample)[index % 128 // 32]
    return -1.0 if word >> index % 32 & 1 else 1.0


def rounding_noise(index: int, seed: int, stream: int) -> tuple[int, float]:
    """16 random bits of an element and the dither of its block: docs/noise.md, Stochastic."""
    block = index // 8
    call = words(block // 64 * 32 + block % 32, seed, stream, 1 << 31)
    first, second = call[2:] if block % 64 >= 32 else call[:2]
    data = (first if index % 8 < 4 else second).to_bytes(4, "little")
    random16 = data[index % 4] << 8 | data[(index + 1) % 4]
    total = (first + second) & MASK32
    signed = total - (1 << 32) if total >> 31 else total
    return random16, to_grid(Fraction(signed)) * 2.0**-54


def round_stochastic(weight: float, change: float, random16: int, half: bool) -> float:
    """Adds a float32 change to a finite 16-bit weight; bfloat16, or float16 when ``half``."""
    value = add(weight, change)
    size, sign = abs(value), -1.0 if value < 0 else 1.0
    if not half:
        return sign * float_of((bits_of_float(size) + random16) & 0xFFFF0000)
    lift = 2.0**-14 if size < 2.0**-14 else 0.0
    lifted = bits_of_float(add(size, lift))
    cut = float_of((lifted + (random16 >> 3)) & 0xFFFFE000) - lift
    return sign * (cut if cut < 65536.0 else float("inf"))


def rounding_start(weight: float, dither: float, half: bool) -> float:
    """Where the sum of a stochastic update of a finite weight starts."""
    scale = bits_of_float(weight) & 0x7F000000
    if half:
        scale = max(scale, 0x38000000)
    return multiply(float_of(scale), dither)


# --- The servers against it ----------------------------------------------------------------------

INDICES = [0, 1, 7, 8, 127, 128, 255, 256, 511, 512, (1 << 32) + 5, (1 << 35) - 1]
STREAM = zk.noise.stream_of("w")


def test_noise(server, rng, distribution):
    key = rng.key()
    contract = {"gaussian": gaussian, "rademacher": rademacher, "rank1": rank1_sign}
    for index in [*INDICES, *rng.integers(20, bits=35)]:
        z = zk.noise(1, **key, offset=index, distribution=distribution)
        assert z.item() == contract[distribution](index, **key)


@pytest.mark.covering(dtype=[torch.bfloat16, torch.float16])
def test_stochastic_rounding(server, rng, dtype):
    half = dtype == torch.float16
    seed, rounding_seed, offset = rng.integer(64), rng.integer(64), rng.integer(34)
    coef = rng.coefs(1).item()
    weights = rng.weights(520, dtype)  # both halves of a shared Philox call, and one block more
    call = {"offsets": {"w": offset}, "rounding_seed": rounding_seed, "decay": 0.25}
    after = changed({"w": weights}, seed, coef, rounding="stochastic", **call)["w"].tolist()
    for i, weight in enumerate(weights.tolist()):
        random16, dither = rounding_noise(offset + i, rounding_seed, STREAM)
        start = rounding_start(weight, dither, half)
        total = fma(weight, -0.25, start)
        total = fma(coef, gaussian(offset + i, seed, STREAM, 0), total)
        assert after[i] == round_stochastic(weight, total, random16, half)


GRIDS = {
    torch.float32: (24, -149, 128),
    torch.bfloat16: (8, -133, 128),
    torch.float16: (11, -24, 16),
}


def assert_nearest(weights, seeds, coefs):
    """A pass rounds every fused multiply-add once, and the sum with the weight to the nearest."""
    after = changed({"w": weights}, seeds, coefs)["w"].tolist()
    for i, weight in enumerate(weights.tolist()):
        total = 0.0
        for seed, coef in zip(seeds, coefs, strict=True):
            total = fma(coef, gaussian(i, seed, STREAM, 0), total)
        wanted = to_grid(Fraction(add(weight, total)), *GRIDS[weights.dtype])
        assert after[i] == wanted


def test_nearest_rounding(server, rng, dtype):
    assert_nearest(rng.weights(200, dtype), rng.integers(3), rng.coefs(3).tolist())


def test_fma_through_the_primitive(server, rng):
    """Coefficients halfway between two float32 of the weights: each server's FMA and add."""
    weights = torch.tensor([1.0, 1.0 + 2.0**-23, 2.0, 0.5, -1.0, -0.0, 0.0, 2.0**-149] * 8)
    coefs = [2.0**-24, 2.0**-24 + 2.0**-47, -(2.0**-25), 2.0**-126 * (1 + 2.0**-23)]
    assert_nearest(weights, rng.integers(len(coefs)), coefs)


# --- The software FMA ----------------------------------------------------------------------------


def random_floats(rng, count):
    """Any finite bit patterns, and around 1 where sums cancel."""
    patterns = [p for p in rng.integers(count, bits=32) if p >> 23 & 0xFF != 0xFF]
    ordinary = [p & 0x80FFFFFF | 0x3F000000 for p in rng.integers(count, bits=32)]
    return [float_of(p) for p in patterns + ordinary]


def hard_products(rng, count):
    """(a, b, c) where the exact sum is near, or within 2^-70 of, halfway between two float32.

    Rounding the sum to double first, and to float32 after, gets these wrong.
    """
    for pattern in rng.integers(count, bits=30):
        a = 1.0 + (pattern & 0x7FFFFF) * 2.0**-23
        b = (1.0 + (pattern >> 23) * 2.0**-23) * 2.0 ** -(24 + pattern % 40)
        big = 1.0 + (pattern >> 7 & 0x7FFFFF) * 2.0**-23
        for sign in (1.0, -1.0):
            yield a, sign * b, big
            yield 1.0 + 2.0**-23, sign * (1.0 - 2.0**-23) * 2.0**-24, big
            yield 2.0**-60, sign * 2.0**-60, big


def test_reference_fma_rounds_once(rng):
    values = random_floats(rng, 600)
    third = len(values) // 3
    triples = list(zip(values, values[third:], values[2 * third :], strict=False))
    triples += list(zip(values, values[::-1], (-v for v in values), strict=False))
    # c cancels the product but for its low half.
    pairs = zip(values, values[7:], strict=False)
    triples += [(a, b, -float(np.float32(a * b))) for a, b in pairs if abs(a * b) < 1e38]
    triples += list(hard_products(rng, 200))
    a, b, c = torch.tensor(triples, dtype=torch.float64).float().T.contiguous()
    for got, triple in zip(reference._fma(a, b, c).tolist(), triples, strict=True):
        assert got == fma(*triple), triple
    # These inputs tell it from one that rounds to double first.
    naive = torch.tensor([x * y + z for x, y, z in triples], dtype=torch.float64).float().tolist()
    assert naive != [fma(*triple) for triple in triples]
