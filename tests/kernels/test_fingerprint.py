"""Fingerprints: equal on every backend, and different after any change."""

from __future__ import annotations

import itertools

import pytest
import torch

import zorba_kernels as zk
from tests.conftest import INTERPRETED
from tests.kernels.bits import DTYPES
from tests.kernels.conftest import not_interpreted


def fingerprint(tensors, **call):
    return zk.fingerprint(zk.ParamTable(tensors), **call)


def test_equals_the_oracle(compiled, rng, dtype, size):
    tensors = {"a": rng.weights(size, dtype), "b": rng.weights((7, 9), dtype)}
    mine = fingerprint(tensors)
    assert mine == fingerprint(tensors, backend="reference")
    assert 0 <= mine < 1 << 64


# A launch a bit: the interpreter has time for a few hundred.
@pytest.mark.covering(numel=[1] if INTERPRETED else [1, 2, 3, 4, 5, 35])
def test_every_single_bit_shows(server, rng, dtype, numel):
    weights = rng.weights(numel, dtype)
    words = weights.view(torch.int32 if dtype == torch.float32 else torch.int16)
    width = 8 * weights.element_size()
    seen = {fingerprint({"w": weights})}
    for element, bit in itertools.product(range(numel), range(width)):
        flip = 1 << bit if bit < width - 1 else -(1 << bit)
        words[element] ^= flip
        seen.add(fingerprint({"w": weights}))
        words[element] ^= flip
    assert len(seen) == 1 + numel * width
    assert fingerprint({"w": weights}) in seen


def test_positions_and_names_show(server, rng, dtype):
    a, b = rng.weights(1000, dtype), rng.weights(1000, dtype)
    a[3], a[900] = 2.0, 3.0
    swapped = a.clone()
    swapped[3], swapped[900] = 3.0, 2.0
    some = [{"a": a, "b": b}, {"a": b, "b": a}, {"a": a, "c": b}, {"a": a}]
    some += [{"a": swapped, "b": b}, {"a": a.roll(4), "b": b}]
    assert len(set(map(fingerprint, some))) == len(some)


def test_wrappers_order_and_groups_do_not_show(server, rng):
    tensors = {name: rng.weights(50, torch.bfloat16) for name in "abcde"}
    plain = fingerprint(tensors)
    assert plain == fingerprint({f"module._orig_mod.{name}": t for name, t in tensors.items()})
    assert plain == fingerprint(dict(reversed(tensors.items())))
    assert plain == zk.fingerprint(zk.ParamTable(tensors, groups={"c": 3}))


WORD = torch.tensor([1, 2, 3, 4], dtype=torch.int16)
PATTERNS = torch.tensor([0, -(1 << 31), 0x7FC00000, 0x7FC00001], dtype=torch.int32)
APART = {
    # The last lane is filled up with zero bytes; the number of elements shows all the same.
    **{f"zeros, {dtype}": [torch.zeros(n, dtype=dtype) for n in range(10)] for dtype in DTYPES},
    "the same bytes": [WORD.view(dtype) for dtype in DTYPES],
    "signed zeros and payloads of NaN": PATTERNS.view(torch.float32).split(1),
}


@pytest.mark.parametrize("case", APART)
def test_what_shows(server, case):
    assert len({fingerprint({"w": tensor}) for tensor in APART[case]}) == len(APART[case])


@not_interpreted("it has no threads")
@pytest.mark.usefixtures("threads")
def test_threads(server, rng):
    weights = {"a": rng.weights(600_001, torch.bfloat16), "b": rng.weights(63, torch.float32)}
    seen = set()
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        seen.add(fingerprint(weights))
    assert len(seen) == 1
