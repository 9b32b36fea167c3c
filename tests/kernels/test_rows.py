"""RowsTable: the bits that a pass over the whole parameter gives its rows."""

from __future__ import annotations

import pytest
import torch

import zorba_kernels as zk
from tests.conftest import INTERPRETED
from tests.kernels.bits import assert_same_bits
from zorba_kernels.rows import RowsTable

ROWS = 40 if INTERPRETED else 300


@pytest.mark.covering(columns=[1, 7, 128, 577], terms=[1, 3])
def test_rows_have_the_bits_of_the_whole(
    server, rng, dtype, rounding, distribution, columns, terms
):
    whole = {"other": rng.weights(5, dtype), "w": rng.weights(ROWS * columns, dtype)}
    whole["w"] = whole["w"].reshape(ROWS, columns)
    table = zk.ParamTable(whole, groups={"w": 1})
    before = whole["w"].clone()
    coefs = torch.stack([torch.zeros(terms), rng.coefs(terms)])
    call = {"samples": rng.integers(terms, bits=31), "decay": [0.5, 0.1], "rounding_seed": 7}
    program = zk.Program(rng.integers(terms), coefs, distribution, rounding, **call)
    numbers = torch.randperm(ROWS, generator=rng.generator)[:17]
    rows = RowsTable(table.entries[1], numbers, table.num_groups)
    rows.run(program)
    assert_same_bits(table.entries[1].tensor, before)
    assert (rows.numel, rows.tensor.shape) == (17 * columns, (17, columns))
    table.run(program)
    assert_same_bits(rows.tensor, whole["w"][numbers])
    assert columns == 1 or not torch.equal(rows.tensor, before[numbers])


def test_it_runs_in_place_alone(rng):
    table = zk.ParamTable({"w": rng.weights(12, torch.float32).reshape(3, 4)})
    rows, other = (RowsTable(table.entries[0], torch.tensor([2]), 1) for _ in range(2))
    with pytest.raises(ValueError, match="in place"):
        rows.run(zk.Program(1, 1.0), other)
