"""Weights at the edges of their formats, zero coefficients, and the caller's flush mode."""

from __future__ import annotations

import pytest
import torch

import zorba_kernels as zk
from tests.kernels.bits import assert_same_bits, bits_of
from tests.kernels.conftest import not_interpreted

HALF_PATTERNS = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
"""Every 16-bit pattern: each bfloat16 and float16 there is."""


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All 16-bit values; for float32 a grid over signs, exponents and edge mantissas."""
    if dtype != torch.float32:
        return HALF_PATTERNS.view(dtype).clone()
    edges = torch.tensor([0, 1, 2, 0x3FFFFF, 0x400000, 0x7FFFFE, 0x7FFFFF])
    exponents = torch.arange(256) << 23
    positive = (exponents[:, None] + edges).reshape(-1).to(torch.int32)
    return torch.cat([positive, positive | -(1 << 31)]).view(torch.float32)


@pytest.mark.covering(coef=[1e-3, 1e-40, 1e38])
def test_every_value(compiled, rng, dtype, rounding, coef):
    weights = every_value(dtype)
    expected = weights.clone()
    seed = rng.integer(64)
    zk.add_noise_(zk.ParamTable({"w": weights}), seed, coef, rounding=rounding)
    table = zk.ParamTable({"w": expected})
    zk.add_noise_(table, seed, coef, rounding=rounding, backend="reference")
    assert_same_bits(weights, expected)


def test_zero_coefs_leave_every_bit(server, dtype, rounding):
    """-0.0, subnormals and the payloads of NaNs too; also in a pass that changes another group."""
    weights = every_value(dtype)
    raw = torch.int32 if dtype == torch.float32 else torch.int16
    before = weights.view(raw).clone()
    other = torch.zeros(100, dtype=dtype)
    table = zk.ParamTable({"w": weights, "other": other}, groups={"other": 1})
    coefs = [[0.0, -0.0], [0.1, 0.0]]
    zk.add_noise_(table, [1, 2], coefs, rounding=rounding)
    zk.add_noise_(table, [1, 2], coefs, rounding=rounding, rounds=[1, 1])
    assert torch.equal(weights.view(raw), before)
    assert other.any()


def test_subnormal_coefs_count_as_zero(server):
    weights = torch.full((1000,), 2.0**-130, dtype=torch.bfloat16)
    before = weights.clone()
    zk.add_noise_(zk.ParamTable({"w": weights}), 1, 2.0**-127, rounding="stochastic")
    assert_same_bits(weights, before)


def test_non_finite_weights(server, dtype, rounding):
    weights = torch.tensor([torch.inf, -torch.inf, torch.nan] * 100, dtype=dtype)
    before = weights.clone()
    for seed in range(5):
        zk.add_noise_(zk.ParamTable({"w": weights}), seed, 10.0, rounding=rounding)
    assert_same_bits(weights, before)


def test_overflow_goes_to_infinity(server, dtype, rounding):
    largest = torch.finfo(dtype).max
    weights = torch.full((1000,), largest, dtype=dtype)
    call = {"distribution": "rademacher", "rounding": rounding}
    zk.add_noise_(zk.ParamTable({"w": weights}), 1, largest / 2, **call)
    z = zk.noise(1000, seed=1, stream=zk.noise.stream_of("w"), distribution="rademacher")
    assert_same_bits(weights[z > 0], torch.full_like(weights[z > 0], torch.inf))
    assert bool((weights[z < 0] < largest * 0.51).all())
    assert 0 < int((z > 0).sum()) < 1000


def test_float16_overflows_where_nearest_does(server):
    """65504 + 16 is halfway to 65536: ties to even, so infinite; a little less is not."""
    z = zk.noise(64, seed=1, stream=zk.noise.stream_of("w"), distribution="rademacher")
    for step, expected in ((16.0, torch.inf), (15.99, 65504.0)):
        weights = torch.full((64,), 65504.0, dtype=torch.float16)
        zk.add_noise_(zk.ParamTable({"w": weights}), 1, step, "rademacher")
        assert bool((weights[z > 0] == expected).all())


def test_signed_zero(server, dtype):
    """w + 0 * z is skipped; a sum that cancels is +0, as IEEE-754 says."""
    step = 0.5
    z = zk.noise(64, seed=1, stream=zk.noise.stream_of("w"), distribution="rademacher")
    weights = (-step * z).to(dtype)
    zk.add_noise_(zk.ParamTable({"w": weights}), 1, step, "rademacher")
    assert not bits_of(weights).any()


@not_interpreted("it computes on the host in the caller's mode; a GPU has no such mode")
def test_flush_mode_of_the_caller_changes_nothing(server, rng, dtype, rounding):
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot flush subnormals")
    tiny = torch.finfo(dtype).tiny
    weights = (torch.randn(1000, generator=rng.generator) * tiny / 4).to(dtype)
    seeds, coefs = rng.integers(3), [max(tiny / 8, 2.0**-126), 2.0**-127, 2.0**-126]
    results, hashes = [], []
    try:
        for flush in (False, True):
            copy = weights.clone()
            torch.set_flush_denormal(flush)
            table = zk.ParamTable({"w": copy})
            zk.add_noise_(table, seeds, coefs, rounding=rounding, decay=0.3)
            hashes.append(zk.fingerprint(table))
            assert (torch.tensor(1e-38) * 0.1).view(torch.int32).item() == 0 or not flush
            torch.set_flush_denormal(False)
            results.append(copy)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(results[1], results[0])
    assert hashes[0] == hashes[1]
    assert bool(((results[0] != 0) & (results[0].abs() < tiny)).any())
