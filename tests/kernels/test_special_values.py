"""Weights at the edges of their formats, zero coefficients, and the caller's flush mode."""

from __future__ import annotations

import pytest
import torch

import zorba_kernels as zk
from tests.kernels.bits import assert_same_bits, bits_of, changed
from tests.kernels.conftest import not_interpreted

SIGNS = {"seed": 1, "stream": zk.noise.stream_of("w"), "distribution": "rademacher"}
"""Noise of ``add_noise_(..., 1, coef, "rademacher")`` on a weight called w."""


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All 16-bit values; for float32 a grid over signs, exponents and edge mantissas."""
    if dtype != torch.float32:
        return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    edges = torch.tensor([0, 1, 2, 0x3FFFFF, 0x400000, 0x7FFFFE, 0x7FFFFF])
    exponents = torch.arange(256) << 23
    positive = (exponents[:, None] + edges).reshape(-1).to(torch.int32)
    return torch.cat([positive, positive | -(1 << 31)]).view(torch.float32)


@pytest.mark.covering(coef=[1e-3, 1e-40, 1e38])
def test_every_value(compiled, rng, dtype, rounding, coef):
    weights, seed = {"w": every_value(dtype)}, rng.integer(64)
    expected = changed(weights, seed, coef, rounding=rounding, backend="reference")
    assert_same_bits(changed(weights, seed, coef, rounding=rounding), expected)


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
    weights = {"w": torch.full((1000,), 2.0**-130, dtype=torch.bfloat16)}
    assert_same_bits(changed(weights, 1, 2.0**-127, rounding="stochastic"), weights)


def test_non_finite_weights(server, dtype, rounding):
    weights = {"w": torch.tensor([torch.inf, -torch.inf, torch.nan] * 100, dtype=dtype)}
    for seed in range(5):
        assert_same_bits(changed(weights, seed, 10.0, rounding=rounding), weights)


def test_overflow_goes_to_infinity(server, dtype, rounding):
    largest = torch.finfo(dtype).max
    weights = {"w": torch.full((1000,), largest, dtype=dtype)}
    after = changed(weights, 1, largest / 2, "rademacher", rounding)["w"]
    up = zk.noise(1000, **SIGNS) > 0
    assert bool((after[up] == torch.inf).all())
    assert bool((after[~up] < largest * 0.51).all())
    assert 0 < int(up.sum()) < 1000
    if (dtype, rounding) == (torch.float16, "nearest"):
        # 65504 + 16 is halfway to 65536: ties to even, so infinite; a little less is not.
        for step, expected in ((16.0, torch.inf), (15.99, largest)):
            assert bool((changed(weights, 1, step, "rademacher")["w"][up] == expected).all())


def test_signed_zero(server, dtype):
    """w + 0 * z is skipped; a sum that cancels is +0, as IEEE-754 says."""
    weights = (-0.5 * zk.noise(64, **SIGNS)).to(dtype)
    assert not bits_of(changed({"w": weights}, 1, 0.5, "rademacher")["w"]).any()


@not_interpreted("it computes on the host in the caller's mode; a GPU has no such mode")
def test_flush_mode_of_the_caller_changes_nothing(server, rng, dtype, rounding):
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot flush subnormals")
    tiny = torch.finfo(dtype).tiny
    weights = {"w": (torch.randn(1000, generator=rng.generator) * tiny / 4).to(dtype)}
    seeds, coefs = rng.integers(3), [max(tiny / 8, 2.0**-126), 2.0**-127, 2.0**-126]
    results, hashes = [], []
    try:
        for flush in (False, True):
            torch.set_flush_denormal(flush)
            results.append(changed(weights, seeds, coefs, rounding=rounding, decay=0.3))
            hashes.append(zk.fingerprint(zk.ParamTable(results[-1])))
            assert (torch.tensor(1e-38) * 0.1).view(torch.int32).item() == 0 or not flush
            torch.set_flush_denormal(False)
    finally:
        torch.set_flush_denormal(False)
    plain, flushed = (after["w"] for after in results)
    assert_same_bits(flushed, plain)
    assert hashes[0] == hashes[1]
    assert bool(((plain != 0) & (plain.abs() < tiny)).any())
