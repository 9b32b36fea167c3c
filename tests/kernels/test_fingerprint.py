"""Fingerprints: equal on every backend, and different after any change."""

from __future__ import annotations

import itertools

import pytest
import torch

import zorba_kernels as zk
from tests.conftest import INTERPRETED
from tests.kernels.conftest import not_interpreted


def fingerprint(tensors, **call):
    return zk.fingerprint(zk.ParamTable(tensors), **call)


def raw(tensor):
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def test_equals_the_oracle(compiled, rng, dtype, size):
    tensors = {"a": rng.weights(size, dtype), "b": rng.weights((7, 9), dtype)}
    mine = fingerprint(tensors)
    assert mine == fingerprint(tensors, backend="reference")
    assert 0 <= mine < 1 << 64


# A launch a bit: the interpreter has time for a few hundred.
@pytest.mark.covering(numel=[1] if INTERPRETED else [1, 2, 3, 4, 5, 63])
def test_every_single_bit_shows(server, rng, dtype, numel):
    weights = rng.weights(numel, dtype)
    words = raw(weights)
    width = 8 * weights.element_size()
    seen = {fingerprint({"w": weights})}
    for element, bit in itertools.product(range(numel), range(width)):
        flip = 1 << bit if bit < width - 1 else -(1 << bit)
        words[element] ^= flip
        seen.add(fingerprint({"w": weights}))
        words[element] ^= flip
    assert len(seen) == 1 + numel * width


def test_positions_show(server, rng, dtype):
    weights = rng.weights(1000, dtype)
    swapped = weights.clone()
    swapped[3], swapped[900] = 2.0, 3.0
    one = fingerprint({"w": swapped})
    swapped[3], swapped[900] = 3.0, 2.0
    assert one != fingerprint({"w": swapped})
    assert fingerprint({"w": weights}) != fingerprint({"w": weights.roll(4)})


def test_names_show_and_wrappers_do_not(server, rng):
    a, b = rng.weights(100, torch.float32), rng.weights(100, torch.float32)
    plain = fingerprint({"a": a, "b": b})
    assert plain != fingerprint({"a": b, "b": a})
    assert plain != fingerprint({"a": a, "c": b})
    assert plain != fingerprint({"a": a})
    assert plain == fingerprint({"module.a": a, "_orig_mod.b": b})


def test_order_of_tensors_and_groups_do_not_show(server, rng):
    tensors = {name: rng.weights(50, torch.bfloat16) for name in "abcde"}
    backwards = dict(reversed(tensors.items()))
    assert fingerprint(tensors) == fingerprint(backwards)
    table = zk.ParamTable(tensors, groups={"c": 3})
    assert fingerprint(tensors) == zk.fingerprint(table)


def test_padding_is_not_mistaken_for_zeros(server):
    """The last lane is filled up with zero bytes; the number of elements shows all the same."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        seen = {fingerprint({"w": torch.zeros(numel, dtype=dtype)}) for numel in range(10)}
        assert len(seen) == 10
        ones = {
            fingerprint({"w": torch.nn.functional.pad(torch.ones(1, dtype=dtype), (0, zeros))})
            for zeros in range(4)
        }
        assert len(ones) == 4


def test_dtypes_show(server):
    """Also where the bytes are the same."""
    word = torch.tensor([1, 2, 3, 4], dtype=torch.int16)
    views = [word.view(torch.bfloat16), word.view(torch.float16), word.view(torch.float32)]
    assert len({fingerprint({"w": view}) for view in views}) == 3


def test_signed_zero_and_nan_payloads_show(server):
    patterns = torch.tensor([0, -(1 << 31), 0x7FC00000, 0x7FC00001], dtype=torch.int32)
    values = patterns.view(torch.float32)
    assert len({fingerprint({"w": values[i : i + 1]}) for i in range(4)}) == 4


@not_interpreted("it has no threads")
@pytest.mark.usefixtures("threads")
def test_threads(server, rng):
    weights = {"a": rng.weights(600_001, torch.bfloat16), "b": rng.weights(63, torch.float32)}
    seen = set()
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        seen.add(fingerprint(weights))
    assert len(seen) == 1


def test_restoring_restores(server, rng):
    weights = rng.weights(1000, torch.bfloat16)
    before = fingerprint({"w": weights})
    saved = weights.clone()
    zk.add_noise_(zk.ParamTable({"w": weights}), 1, 1.0)
    assert fingerprint({"w": weights}) != before
    weights.copy_(saved)
    assert fingerprint({"w": weights}) == before
