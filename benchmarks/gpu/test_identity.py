"""z is the same at every counter on every backend; cpu and the oracle go as far as time allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import zorba_kernels as zk
from benchmarks.bench import Bench, assert_equal_bits, reference_chunk
from zorba_kernels.noise import DISTRIBUTIONS

pytestmark = pytest.mark.gpu

STREAM = zk.noise.stream_of("w")
# Columns of the matrices of rank-one noise: a vector; whole words of signs and calls; neither.
ROWS = (0, 4096, 576, 1001, 7)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_all_counters(bench: Bench, distribution: str) -> None:
    """The backends of a GPU; a rehearsal has one, and compares it with the oracle."""
    names = [*bench.backends, "reference"][:2]
    bench.facts.update(backends=names, elements=0, counters=0)
    for i in range(bench.sizes.seeds[distribution]):
        key = random_key(bench, distribution)
        for offset in range(0, bench.sizes.elements, bench.sizes.chunk):
            shape = shape_of(distribution, bench.sizes.chunk, ROWS[i % len(ROWS)])
            mine, theirs = (zk.noise(shape, **key, offset=offset, backend=name) for name in names)
            assert_equal_bits(mine, theirs, f"{key}, {shape} from index {offset}")
            del mine, theirs  # before the next two are made: there is no memory for four
            count(bench, math.prod(shape), distribution)


@pytest.mark.parametrize(
    ("distribution", "other", "share"),
    [
        *(("gaussian", "cpu", 1 / 6), ("gaussian", "reference", 1 / 5)),
        *(("rademacher", "cpu", 1 / 4), ("rademacher", "reference", 1 / 3)),
        *(("rank1", "cpu", 1 / 2), ("rank1", "reference", 1)),
    ],
)
def test_chunks_in_random_order(bench: Bench, distribution: str, other: str, share: float) -> None:
    """Each takes its share of the time that is left, and a least number of elements."""
    stop = bench.left() * (1 - 0.9 * share)
    key, chunk = random_key(bench, distribution), bench.sizes.chunk_other
    offsets = list(range(0, bench.sizes.elements, chunk))
    bench.rng.shuffle(offsets)
    bench.facts.update(backends=[bench.backends[0], other], elements=0, counters=0)
    shape = shape_of(distribution, chunk, bench.rng.choice(ROWS))
    make = partial(zk.noise, shape, **key)
    theirs = partial(make, backend=other) if other == "reference" else through_weights(key, shape)
    with reference_chunk(chunk):
        for offset in offsets:
            mine = make(offset=offset, backend=bench.backends[0])
            assert_equal_bits(mine, theirs(offset=offset), f"{key}, {shape} from index {offset}")
            count(bench, math.prod(shape), distribution)
            if bench.left() < stop and bench.facts["elements"] >= bench.sizes.least_other:
                break


def shape_of(distribution: str, elements: int, columns: int) -> tuple[int, ...]:
    """Returns a shape of about so many elements; only rank-one noise depends on more than that."""
    if distribution != "rank1" or columns == 0:
        return (elements,)
    return (elements // columns, columns)


def count(bench: Bench, elements: int, distribution: str) -> None:
    bench.facts["elements"] += elements
    bench.facts["counters"] += elements // zk.noise.BLOCK_ELEMENTS[distribution]


def random_key(bench: Bench, distribution: str) -> dict[str, Any]:
    key = {"seed": bench.rng.getrandbits(64), "stream": STREAM, "sample": bench.rng.getrandbits(31)}
    return {**key, "distribution": distribution, "device": bench.device}


def through_weights(key: dict[str, Any], shape: tuple[int, ...]) -> Callable[..., Tensor]:
    """Returns what makes z with the cpu backend as 0 + 1 * z, where the device reads it fast."""
    zeros = torch.zeros(shape)
    held = torch.empty(shape, pin_memory=key["device"].type == "cuda")
    there = torch.empty(shape, device=key["device"])

    def noise(offset: int) -> Tensor:
        table, out = (zk.ParamTable({"w": t}, offsets={"w": offset}) for t in (zeros, held))
        call = {"distribution": key["distribution"], "samples": [key["sample"]]}
        zk.add_noise(table, out, key["seed"], 1.0, **call, backend="cpu")
        return there.copy_(held)

    return noise
