"""Arguments out of range: a clear error each, and nothing changed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import zorba_kernels as zk
from tests.kernels.bits import assert_same_bits, changed

CALLS = {
    "coef NaN": (1, math.nan, {}, ValueError, "coefs must be finite.*nan"),
    "coef inf": (1, -math.inf, {}, ValueError, "coefs must be finite.*-inf"),
    "coef beyond float32": (1, 3.5e38, {}, ValueError, "coefs must be finite.*3.5e"),
    "one coef of many": ([1, 2], [[1.0, 0.0], [0.0, math.inf]], {}, ValueError, "coefs"),
    "too many coefs": (1, [0.1, 0.2], {}, ValueError, r"shape \(2,\)"),
    "too few coefs": ([1, 2], 0.1, {}, ValueError, "coefs has shape"),
    "too few groups": ([1, 2], [[0.1, 0.2]], {}, ValueError, r"\[2, 2\]"),
    "three dimensions": (1, torch.zeros(1, 1, 1), {}, ValueError, "coefs has shape"),
    "negative seed": (-1, 0.1, {}, ValueError, "seed must be in"),
    "large seed": (1 << 64, 0.1, {}, ValueError, "seed must be in"),
    "float seed": (1.5, 0.1, {}, TypeError, "seed must be an integer"),
    "float seeds": (torch.tensor([1.5]), 0.1, {}, TypeError, "seed must be an integer"),
    "text seed": ("7", 0.1, {}, TypeError, "seed must be an integer"),
    "negative sample": (1, 0.1, {"samples": -1}, ValueError, "sample must be in"),
    "large sample": (1, 0.1, {"samples": 1 << 31}, ValueError, "sample must be in"),
    "missing sample": ([1, 2], [0.1, 0.1], {"samples": [1]}, ValueError, "1 samples"),
    "rounds too short": ([1, 2], [0.1, 0.1], {"rounds": [1]}, ValueError, "rounds"),
    "negative round": (1, 0.1, {"rounds": [2, -1]}, ValueError, "rounds"),
    "float round": ([1, 2], [0.1, 0.1], {"rounds": [1.5, 1.5]}, TypeError, "round"),
    "rounding seed": (1, 0.1, {"rounding_seed": -1}, ValueError, "rounding_seed"),
    "two rounding seeds": (1, 0.1, {"rounding_seed": [1, 2]}, ValueError, "rounding seeds"),
    "decay NaN": (1, 0.1, {"decay": math.nan}, ValueError, "decay must be finite"),
    "decay shape": (1, 0.1, {"decay": [0.1, 0.2, 0.3]}, ValueError, "decay has shape"),
    "distribution": (1, 0.1, {"distribution": "uniform"}, ValueError, "gaussian, rademacher"),
    "rounding": (1, 0.1, {"rounding": "down"}, ValueError, "nearest, stochastic"),
    "backend": (1, 0.1, {"backend": "cupy"}, ValueError, "unknown backend 'cupy'"),
}


@pytest.mark.parametrize("case", CALLS)
def test_add_noise_refuses(case):
    seeds, coefs, call, error, message = CALLS[case]
    weights = {"a": torch.ones(100), "b": torch.ones(100, dtype=torch.bfloat16)}
    table = zk.ParamTable(weights, groups={"b": 1})
    out = {name: torch.full_like(tensor, 7.0) for name, tensor in weights.items()}
    with pytest.raises(error, match=message):
        zk.add_noise_(table, seeds, coefs, **call)
    with pytest.raises(error, match=message):
        zk.add_noise(table, zk.ParamTable(out, groups={"b": 1}), seeds, coefs, **call)
    for some, value in ((weights, 1.0), (out, 7.0)):
        assert all(bool((tensor == value).all()) for tensor in some.values())


NOISE = {
    "negative size": ({"shape": -1}, ValueError, "shape"),
    "negative dimension": ({"shape": (2, -3)}, ValueError, "shape"),
    "both negative": ({"shape": (-2, -3)}, ValueError, "shape"),
    "negative offset": ({"offset": -1}, ValueError, "outside"),
    "float offset": ({"offset": 1.5}, TypeError, "offset"),
    "offset beyond": ({"offset": 1 << 35}, ValueError, "outside"),
    "seed": ({"seed": 1 << 64}, ValueError, "seed"),
    "stream": ({"stream": -1}, ValueError, "stream"),
    "sample": ({"sample": 1 << 31}, ValueError, "sample"),
    "distribution": ({"distribution": "normal"}, ValueError, "distribution"),
}


@pytest.mark.parametrize("case", NOISE)
def test_noise_refuses(case):
    change, error, message = NOISE[case]
    with pytest.raises(error, match=message):
        zk.noise(**({"shape": 8, "seed": 1, "stream": 1} | change))


LARGE = (1 << 64) - 3
KINDS = {
    "seeds": [
        *([LARGE], (LARGE,), LARGE, np.array([LARGE], np.uint64), [np.uint64(LARGE)]),
        *(torch.tensor([LARGE], dtype=torch.uint64), torch.tensor([-3])),
    ],
    "coefs": [
        *(0.1, [0.1], np.array([0.1]), torch.tensor([0.1], dtype=torch.float64)),
        torch.nn.Parameter(torch.tensor([[0.1]])),
    ],
}


@pytest.mark.parametrize("argument", KINDS)
def test_arguments_of_every_kind(server, argument):
    """Python, numpy and torch numbers, uint64 above 2^63 included, are the same."""
    weights, plain = {"w": torch.zeros(100)}, {"seeds": 1, "coefs": 1.0}
    first, *others = (changed(weights, **plain | {argument: kind}) for kind in KINDS[argument])
    for other in others:
        assert_same_bits(other, first)


def test_largest_float32_coef_is_taken(server):
    after = changed({"w": torch.zeros(100)}, 1, 3.4028235e38, "rademacher")["w"]
    assert bool((after.abs() == torch.finfo(torch.float32).max).all())


@pytest.mark.parametrize("call", [{"rounding": "stochastic"}, {"rounds": []}, {"rounds": [0, 0]}])
def test_no_terms_change_nothing(server, rng, call):
    weights = {"w": rng.weights(100, torch.bfloat16)}
    assert_same_bits(changed(weights, [], [], **call), weights)
