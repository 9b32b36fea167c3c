"""The triton backend in Triton's interpreter, besides what every backend is tested for.

``make test-interpret`` runs this file, and the suites that have a server, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import zorba_kernels as zk
from tests.conftest import INTERPRETED
from tests.kernels.bits import DTYPES, assert_same_bits, changed, written
from zorba_kernels import dispatch
from zorba_kernels.backends import reference, triton
from zorba_kernels.backends.triton_tuning import Config

if not INTERPRETED:
    pytest.skip("for Triton's interpreter: make test-interpret", allow_module_level=True)

import triton as triton_language
import triton.language as tl

from tests.kernels import interpreter
from zorba_kernels.kernels.noise import box_muller

CPU = torch.device("cpu")


@triton_language.jit
def normals(words, first, second, COUNT: tl.constexpr):  # noqa: N803
    at = tl.arange(0, COUNT)
    a, b = box_muller(tl.load(words + at).to(tl.uint32, bitcast=True))
    tl.store(first + at, a)
    tl.store(second + at, b)


def assert_like_the_oracle(tensors, *args, **kwargs):
    expected = changed(tensors, *args, **kwargs, backend="reference")
    for make in (changed, written):
        assert_same_bits(make(tensors, *args, **kwargs, backend="triton"), expected)


def test_it_serves_cpu_tensors_only_when_it_is_named(monkeypatch):
    monkeypatch.delenv("ZORBA_BACKEND", raising=False)
    assert triton.unavailable(CPU) is None

    def served(*args, **kwargs):
        raise AssertionError("served by triton")

    monkeypatch.setitem(dispatch._registered, "triton", replace(triton.BACKEND, noise=served))
    zk.noise(8, seed=1, stream=2)
    with pytest.raises(AssertionError, match="served by triton"):
        zk.noise(8, seed=1, stream=2, backend="triton")
    monkeypatch.setenv("ZORBA_BACKEND", "triton")
    with pytest.raises(AssertionError, match="served by triton"):
        zk.noise(8, seed=1, stream=2)
    assert "interpreter" in triton.unavailable(torch.device("cuda"))


def test_an_interpreter_that_rounds_otherwise_is_refused(monkeypatch):
    def rounds_twice(self, x, y, z):
        return interpreter.TensorHandle(x.data * y.data + z.data, z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", rounds_twice)
    triton._interpreter_fault.cache_clear()
    try:
        assert "does not round" in triton.unavailable(CPU)
    finally:
        triton._interpreter_fault.cache_clear()


def test_every_radius_and_angle():
    every = torch.arange(1 << 16)
    words = torch.cat([every | 0x12340000, every << 16 | 0x5678])
    first, second = torch.empty(1 << 17), torch.empty(1 << 17)
    normals[(1,)](reference._to_int32(words), first, second, COUNT=1 << 17)
    expected = reference._box_muller(words)
    assert_same_bits(first, expected[0])
    assert_same_bits(second, expected[1])


@pytest.mark.covering(terms=[1, 2], strip=[512, 2048])
def test_bits_do_not_depend_on_the_pieces(
    monkeypatch, rng, dtype, rounding, distribution, terms, strip
):
    """Whole strips, ragged ones on either side, addresses without alignment, several tiles."""
    base, shift = rng.weights(6007, dtype), rng.integer(4)
    inside = slice(shift, shift + 5000)
    views = {"a": base[inside], "b": rng.weights(700, dtype)}
    args = (rng.integers(terms), rng.coefs(terms), distribution, rounding)
    offsets = {"a": rng.integer(13), "b": rng.integer(34)}
    expected = changed(views, *args, offsets=offsets, backend="reference")
    whole = base.clone()
    whole[inside] = expected["a"]
    monkeypatch.setattr(triton, "_config", lambda *_: Config(strip, 1))
    monkeypatch.setattr(triton, "TILE", 2048)
    zk.add_noise_(zk.ParamTable(views, offsets=offsets), *args, backend="triton")
    assert_same_bits(views, expected)
    assert_same_bits(base, whole)


@pytest.mark.covering(decays=[False, True], zero=[False, True])
def test_one_term_of_many_groups(rng, rounding, decays, zero):
    weights = {f"{i}": rng.weights(700 * i, DTYPES[i % 3]) for i in range(8)}
    groups = {name: int(name) % 4 for name in weights}
    decay = [0.0, 0.01, 0.0, 0.5] if decays else None
    coefs = rng.coefs(4, 1)
    if zero:
        coefs[1:3] = 0.0
    seed, call = rng.integer(64), {"rounding": rounding, "decay": decay, "groups": groups}
    assert_like_the_oracle(weights, seed, coefs, **call)


def test_decay_of_infinite_weights(rng, rounding, distribution):
    weights = {"w": torch.tensor([math.inf, -math.inf, math.nan, 1.0] * 16).bfloat16()}
    for seeds in ([1], [1, 2]):
        coefs = [0.1] * len(seeds)
        assert_like_the_oracle(weights, seeds, coefs, distribution, rounding, decay=0.1)


def test_fingerprint_of_several_tiles_and_of_views(monkeypatch, rng, dtype):
    base = rng.weights(9000, dtype)
    monkeypatch.setattr(triton, "TILE", 2048)
    for shift in (0, 1, 8):
        table = zk.ParamTable({"w": base[shift:], "e": base[:0]}, offsets={"w": 77})
        mine = zk.fingerprint(table, backend="triton")
        assert mine == zk.fingerprint(table, backend="reference")
