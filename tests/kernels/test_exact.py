"""The oracle against a second implementation, written from the words of the contract.

It works in exact fractions, so it also proves the software FMA and the roundings right.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

import zorba_kernels as zk
from tests.kernels import exact
from tests.kernels.bits import changed
from zorba_kernels.backends import reference

INDICES = [0, 1, 7, 8, 127, 128, 255, 256, 511, 512, (1 << 32) + 5, (1 << 35) - 1]
STREAM = zk.noise.stream_of("w")


def test_noise(server, rng, distribution):
    key, contract = rng.key(), {"gaussian": exact.gaussian, "rademacher": exact.rademacher}
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
        random16, dither = exact.rounding_noise(offset + i, rounding_seed, STREAM)
        start = exact.rounding_start(weight, dither, half)
        total = exact.fma(weight, -0.25, start)
        total = exact.fma(coef, exact.gaussian(offset + i, seed, STREAM, 0), total)
        assert after[i] == exact.round_stochastic(weight, total, random16, half)


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
            total = exact.fma(coef, exact.gaussian(i, seed, STREAM, 0), total)
        wanted = exact.to_grid(Fraction(exact.add(weight, total)), *GRIDS[weights.dtype])
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
    return [exact.float_of(p) for p in patterns + ordinary]


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
        assert got == exact.fma(*triple), triple
    # These inputs tell it from one that rounds to double first.
    naive = torch.tensor([x * y + z for x, y, z in triples], dtype=torch.float64).float().tolist()
    assert naive != [exact.fma(*triple) for triple in triples]
