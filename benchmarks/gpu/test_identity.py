"""z is the same at every counter on every backend; cpu and the oracle go as far as time allows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import zorba_kernels as zk
from benchmarks.bench import Bench, assert_equal_bits, reference_chunk

pytestmark = pytest.mark.gpu

STREAM = zk.noise.stream_of("w")


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_all_counters(bench: Bench, distribution: str) -> None:
    """The backends of a GPU; a rehearsal has one, and compares it with the oracle."""
    names = [*bench.backends, "reference"][:2]
    bench.facts.update(backends=names, elements=0, counters=0)
    for _ in range(bench.sizes.seeds[distribution]):
        key = random_key(bench, distribution)
        for offset in range(0, bench.sizes.elements, bench.sizes.chunk):
            mine, theirs = (
                zk.noise(bench.sizes.chunk, **key, offset=offset, backend=name) for name in names
            )
            assert_equal_bits(mine, theirs, f"{key} from index {offset}")
            del mine, theirs  # before the next two are made: there is no memory for four
            count(bench, bench.sizes.chunk, distribution)


@pytest.mark.parametrize(
    ("distribution", "other", "share"),
    [
        *(("gaussian", "cpu", 1 / 4), ("gaussian", "reference", 1 / 3)),
        *(("rademacher", "cpu", 1 / 2), ("rademacher", "reference", 1)),
    ],
)
def test_chunks_in_random_order(bench: Bench, distribution: str, other: str, share: float) -> None:
    """Each takes its share of the time that is left, and a least number of elements."""
    stop = bench.left() * (1 - 0.9 * share)
    key, chunk = random_key(bench, distribution), bench.sizes.chunk_other
    offsets = list(range(0, bench.sizes.elements, chunk))
    bench.rng.shuffle(offsets)
    bench.facts.update(backends=[bench.backends[0], other], elements=0, counters=0)
    make = partial(zk.noise, chunk, **key)
    theirs = partial(make, backend=other) if other == "reference" else through_weights(key, chunk)
    with reference_chunk(chunk):
        for offset in offsets:
            mine = make(offset=offset, backend=bench.backends[0])
            assert_equal_bits(mine, theirs(offset=offset), f"{key} from index {offset}")
            count(bench, chunk, distribution)
            if bench.left() < stop and bench.facts["elements"] >= bench.sizes.least_other:
                break


def count(bench: Bench, elements: int, distribution: str) -> None:
    bench.facts["elements"] += elements
    bench.facts["counters"] += elements // zk.noise.BLOCK_ELEMENTS[distribution]


def random_key(bench: Bench, distribution: str) -> dict[str, Any]:
    key = {"seed": bench.rng.getrandbits(64), "stream": STREAM, "sample": bench.rng.getrandbits(31)}
    return {**key, "distribution": distribution, "device": bench.device}


def through_weights(key: dict[str, Any], count: int) -> Callable[..., Tensor]:
    """Returns what makes z with the cpu backend as 0 + 1 * z, where the device reads it fast."""
    zeros = torch.zeros(count)
    held = torch.empty(count, pin_memory=key["device"].type == "cuda")
    there = torch.empty(count, device=key["device"])

    def noise(offset: int) -> Tensor:
        table, out = (zk.ParamTable({"w": t}, offsets={"w": offset}) for t in (zeros, held))
        call = {"distribution": key["distribution"], "samples": [key["sample"]]}
        zk.add_noise(table, out, key["seed"], 1.0, **call, backend="cpu")
        return there.copy_(held)

    return noise
