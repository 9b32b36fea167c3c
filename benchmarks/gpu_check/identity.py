"""z is the same at every counter on every backend.

The backends of the GPU are compared with each other at all 2**32 counters of several seeds, on the
GPU. The cpu backend and the oracle, run on the GPU, follow over chunks in random order, for as long
as there is time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import zorba_kernels as zk
from benchmarks.gpu_check.bits import assert_equal_bits
from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.serving import fast_backends, fresh
from benchmarks.gpu_check.sizes import Sizes
from zorba_kernels.backends import reference

Z = Callable[[int, int], Tensor]  # (offset, count) -> values on the device


def run(report: Report, device: torch.device, sizes: Sizes) -> None:
    rng = fresh(report)
    backends = fast_backends(device)
    for distribution, seeds in sizes.seeds.items():
        for other in [*backends[1:], *(["reference"] if len(backends) == 1 else [])]:
            all_counters(report, device, sizes, rng, distribution, seeds, (backends[0], other))
    others = [(d, name) for d in sizes.seeds for name in ("cpu", "reference")]
    for done, (distribution, name) in enumerate(others):
        seconds = 0.9 * report.left() / (len(others) - done)
        chunks_in_random_order(
            report, device, sizes, rng, distribution, (backends[0], name), seconds
        )


def all_counters(
    report: Report,
    device: torch.device,
    sizes: Sizes,
    rng: random.Random,
    distribution: str,
    seeds: int,
    backends: tuple[str, str],
) -> None:
    per_counter = zk.noise.BLOCK_ELEMENTS[distribution]
    title = f"z of {' and '.join(backends)} at every index, {distribution}, {seeds} seeds"
    with report.check(title, elements=0, counters=0) as facts:
        for _ in range(seeds):
            key = random_key(rng, distribution)
            for offset in range(0, sizes.elements, sizes.chunk):
                mine, theirs = (
                    zk.noise(sizes.chunk, **key, offset=offset, device=device, backend=name)
                    for name in backends
                )
                assert_equal_bits(mine, theirs, f"{key} from index {offset}")
                del mine, theirs  # or the next two would stand beside them
                facts["elements"] += sizes.chunk
                facts["counters"] += sizes.chunk // per_counter


def chunks_in_random_order(
    report: Report,
    device: torch.device,
    sizes: Sizes,
    rng: random.Random,
    distribution: str,
    backends: tuple[str, str],
    seconds: float,
) -> None:
    per_counter = zk.noise.BLOCK_ELEMENTS[distribution]
    key = random_key(rng, distribution)
    count = sizes.chunk_other
    offsets = list(range(0, sizes.elements, count))
    rng.shuffle(offsets)
    title = f"z of {' and '.join(backends)}, chunks in random order, {distribution}"
    stop = report.left() - seconds
    facts: dict[str, Any]
    with (
        report.check(title, elements=0, counters=0) as facts,
        other_z(backends[1], device, key, count) as other,
    ):
        for offset in offsets:
            mine = zk.noise(count, **key, offset=offset, device=device, backend=backends[0])
            assert_equal_bits(mine, other(offset, count), f"{key} from index {offset}")
            facts["elements"] += count
            facts["counters"] += count // per_counter
            if report.left() < stop and facts["elements"] >= sizes.least_other:
                break
        facts["all"] = facts["elements"] == sizes.elements


def random_key(rng: random.Random, distribution: str) -> dict[str, Any]:
    """Arguments of ``noise`` besides the range; the stream is that of the name ``w``."""
    return {
        "seed": rng.getrandbits(64),
        "stream": zk.noise.stream_of("w"),
        "sample": rng.getrandbits(31),
        "distribution": distribution,
    }


@contextmanager
def other_z(name: str, device: torch.device, key: dict[str, Any], count: int) -> Iterator[Z]:
    """Makes z with the cpu backend, or with the oracle on the device."""
    if name == "cpu":
        yield z_through_weights(device, key, count)
        return
    with reference_chunk(count):
        yield lambda offset, n: zk.noise(n, **key, offset=offset, device=device, backend=name)


def z_through_weights(device: torch.device, key: dict[str, Any], count: int) -> Z:
    """Makes z with the cpu backend as 0 + 1 * z, in one buffer that the device reads fast."""
    zeros = torch.zeros(count)
    held = torch.empty(count, pin_memory=device.type == "cuda")
    there = torch.empty(count, device=device)

    def z(offset: int, n: int) -> Tensor:
        table, out = (zk.ParamTable({"w": t}, offsets={"w": offset}) for t in (zeros, held))
        samples = [key["sample"]]
        zk.add_noise(
            table, out, key["seed"], 1.0, key["distribution"], samples=samples, backend="cpu"
        )
        return there.copy_(held)[:n]

    return z


@contextmanager
def reference_chunk(elements: int) -> Iterator[None]:
    """Lets the oracle work on more at a time: a GPU has the memory, and launches cost."""
    before = reference.CHUNK
    reference.CHUNK = elements
    try:
        yield
    finally:
        reference.CHUNK = before
