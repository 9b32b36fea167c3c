"""Rank-one noise of matrices: an outer product of signs, of any shape, however it is cut."""

from __future__ import annotations

import pytest
import torch

import zorba_kernels as zk
from tests.conftest import INTERPRETED
from tests.kernels.bits import assert_same_bits, changed, written

# Rows shorter and longer than a vector, a Philox call, a tile and a unit of work; none at all.
SHAPES = [(1, 1), (5, 7), (63, 65), (1000, 1), (1, 1000), (3, 5, 7), (0, 4), (4, 0), (70, 576)]
if not INTERPRETED:
    SHAPES += [(700, 576), (2, 40_000), (40_000, 2), (128, 1024)]

CALL = {"distribution": "rank1"}


@pytest.mark.covering(shape=SHAPES, offset=[0, 3, 2045, 5_000_000_000])
def test_noise(compiled, rng, shape, offset):
    call = {**rng.key(), **CALL, "offset": offset}
    assert_same_bits(zk.noise(shape, **call), zk.noise(shape, **call, backend="reference"))


@pytest.mark.covering(
    shape=SHAPES, offset=[0, 3, 2045, 5_000_000_000], terms=[1, 2, 7, 40], decay=[None, 0.01]
)
def test_add_noise(compiled, rng, dtype, rounding, shape, offset, terms, decay):
    weights, offsets = {"w": rng.weights(shape, dtype)}, {"w": offset}
    seeds, coefs = rng.integers(terms), torch.cat([torch.tensor([0.5]), rng.coefs(terms - 1)])
    rounds = [terms] if terms < 7 else [3, 0, terms - 3]
    call = {**CALL, "rounding": rounding, "decay": decay, "rounds": rounds, "offsets": offsets}
    call["samples"] = rng.integers(terms, bits=31)
    expected = changed(weights, seeds, coefs, **call, backend="reference")
    assert_same_bits(changed(weights, seeds, coefs, **call), expected)
    assert_same_bits(written(weights, seeds, coefs, **call), expected)


def test_is_an_outer_product_of_signs(server, rng):
    z = zk.noise((37, 5, 3), **rng.key(), **CALL)
    assert_same_bits(z.abs(), torch.ones_like(z))
    matrix = z.reshape(37, 15)
    assert_same_bits(matrix * matrix[0, 0], matrix[:, :1] * matrix[:1])


def test_signs_of_rows_are_those_of_a_vector(server, rng):
    key = rng.key()
    vector, matrix = zk.noise(200, **key, **CALL), zk.noise((200, 9), **key, **CALL)
    assert_same_bits(matrix * matrix[:1], (vector * vector[0])[:, None].expand(200, 9))


def test_quality(server, rng):
    """Mean 0 and E z z^T = 1: neither rows and columns, nor samples, nor streams are related."""
    key = rng.key()
    count = 64 if INTERPRETED else 2000
    z = torch.stack([
        zk.noise((16, 16), **(key | {"sample": sample}), **CALL).reshape(-1)
        for sample in range(count)
    ])  # fmt: skip
    bound = 8 / count**0.5  # Hoeffding: one run in 10^9, of 65,792 means of signs
    assert float(z.mean(dim=0).abs().max()) < bound
    related = z.T @ z / count - torch.eye(256)
    assert float(related.abs().max()) < bound


def test_flat_shards_know_their_rows(server, rng, dtype, rounding):
    weights = rng.weights((30, 17), dtype)
    args = (rng.integers(3), rng.coefs(3), "rank1", rounding)
    whole = changed({"w": weights}, *args)["w"].reshape(-1)
    for split in (1, 16, 17, 100):
        for offset, part in ((0, weights.view(-1)[:split]), (split, weights.view(-1)[split:])):
            shard = part.clone()
            table = zk.ParamTable({"w": shard}, offsets={"w": offset}, columns={"w": 17})
            zk.add_noise_(table, *args)
            assert_same_bits(shard, whole[offset : offset + len(part)])


def test_views_that_are_not_contiguous(server, rng):
    weights = rng.weights((20, 40), torch.float32)
    expected = changed({"w": weights[:, ::2].contiguous()}, 5, 0.1, "rank1")["w"]
    view = weights.clone()[:, ::2]
    zk.add_noise_(zk.ParamTable({"w": view}), 5, 0.1, "rank1")
    assert_same_bits(view, expected)


def test_columns_of_a_name_that_is_not_there_are_refused():
    with pytest.raises(ValueError, match="columns names parameters"):
        zk.ParamTable({"w": torch.zeros(3)}, columns={"v": 3})
    with pytest.raises(ValueError, match="columns of 'w' must be"):
        zk.ParamTable({"w": torch.zeros(3)}, columns={"w": -1})


def test_tables_whose_rows_differ_are_refused():
    table = zk.ParamTable({"w": torch.zeros(6)}, columns={"w": 3})
    with pytest.raises(ValueError, match="differ"):
        table.run(zk.Program(1, 0.1, "rank1"), zk.ParamTable({"w": torch.zeros(6)}))
