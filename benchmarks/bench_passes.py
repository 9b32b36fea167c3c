"""One pass over bf16 weights beside the pass that only moves their bytes, and what a step costs.

    python -m pytest benchmarks/bench_passes.py

On a GPU, if there is one; else on the CPU. Nothing can be faster than the limit of a pass: a copy
of the same bytes on a GPU, torch's ``w.add_(c)`` on a CPU.
"""

from __future__ import annotations

import itertools
from functools import partial

import pytest
from torch import Tensor

import zorba_kernels as zk
from benchmarks.bench import Bench, Call, host_seconds
from benchmarks.sizes import count_of, flat_weights
from zorba_kernels.noise import DISTRIBUTIONS, ROUNDINGS

EPS = 1e-3
OF_LIMIT = {"gaussian": 0.90, "rademacher": 0.97}  # targets on a GPU
STEP_MS = 40.0  # target on a GPU: the passes of a step over 13 B weights


def limits(weights: dict[str, Tensor], flat: Tensor, out: Tensor) -> dict[str, Call]:
    """Returns passes that move the bytes of all weights once each way, and no more."""
    return {
        "copy": lambda: out.copy_(flat),
        "plain": lambda: [w.add_(EPS) for w in weights.values()],
    }


def bench_pass(bench: Bench, title: str) -> None:
    shapes = bench.sizes.tables[title]()
    flat, weights = flat_weights(shapes, bench.device)
    flat_out, outputs = flat_weights(shapes, bench.device, like=flat)
    table, out = zk.ParamTable(weights), zk.ParamTable(outputs)
    calls = limits(weights, flat, flat_out)
    for b, d, r in itertools.product(bench.backends, DISTRIBUTIONS, ROUNDINGS):
        rest = (1, EPS, d, r)
        calls[f"{b}, {d}, {r}, in place"] = partial(zk.add_noise_, table, *rest, backend=b)
        calls[f"{b}, {d}, {r}, out of place"] = partial(zk.add_noise, table, out, *rest, backend=b)
    times = bench.in_turn(calls)
    group = f"one pass over {count_of(table.numel)} bf16 weights, {title}"
    bench.passes(group, times, table.numel, 2 * table.nbytes)
    for b, d in itertools.product(bench.backends, OF_LIMIT):
        name = f"{b}, {d}, nearest, in place"
        share = times[bench.limit].median / times[name].median
        unit = f"of the {bench.limit}'s speed"
        bench.target(f"{name}, {title}", share, unit, least=OF_LIMIT[d])


def bench_fingerprint(bench: Bench, title: str) -> None:
    _, weights = flat_weights(bench.sizes.tables[title](), bench.device)
    table = zk.ParamTable(weights)
    calls = {b: partial(zk.fingerprint, table, backend=b) for b in bench.backends}
    group = f"fingerprint of {count_of(table.numel)} bf16 weights, {title}"
    for b, t in bench.in_turn(calls).items():
        bench.measure(group, b, ms=t.median * 1e3, gb_per_s=table.nbytes / t.median / 1e9)


def bench_passes_of_a_step(bench: Bench) -> None:
    """All that a step of central differences does besides its forward passes."""
    flat, weights = flat_weights(bench.sizes.step(), bench.device)
    table = zk.ParamTable(weights)
    half = flat.numel() // 2

    def copies() -> None:
        # Each half goes to the other's place, so that there need be no second copy of 13 B weights.
        for _ in range(3):
            flat[:half].copy_(flat[half : 2 * half])
            flat[half : 2 * half].copy_(flat[:half])

    def passes(distribution: str, backend: str) -> None:
        for coef in (EPS, -2 * EPS, EPS - 1e-6):
            zk.add_noise_(table, 1, coef, distribution, backend=backend)

    kinds = itertools.product(bench.backends, DISTRIBUTIONS)
    mine: dict[str, Call] = {f"{b}, {d}": partial(passes, d, b) for b, d in kinds}
    plain: dict[str, Call] = {
        "copy": copies,
        "plain": lambda: [w.add_(EPS) for _ in range(3) for w in weights.values()],
    }
    times = bench.in_turn(plain | mine)
    weighs = f"{count_of(table.numel)} bf16 weights"
    bench.passes(f"passes of a step over {weighs}", times, table.numel, 3 * 2 * table.nbytes)
    for name in mine:
        figure = times[name].median * 1e3
        bench.target(f"step of {weighs}, {name}", figure, "ms", most=STEP_MS)


@pytest.mark.parametrize("tensors", [1, 291])
def bench_host_time(bench: Bench, tensors: int) -> None:
    """On tables of 64 weights a tensor, too small to take the device any time."""
    shapes = {f"{i}": (64,) for i in range(tensors)}
    table, out = (zk.ParamTable(flat_weights(shapes, bench.device)[1]) for _ in range(2))
    for b in bench.backends:
        calls = {
            "in place": partial(zk.add_noise_, table, 1, EPS, backend=b),
            "out of place": partial(zk.add_noise, table, out, 1, EPS, backend=b),
            "8 terms": partial(zk.add_noise_, table, range(8), [EPS] * 8, backend=b),
        }
        for name, call in calls.items():
            us = host_seconds(call, bench.device, bench.sizes.calls) * 1e6
            bench.measure(f"host time of a call, {tensors} tensors", f"{b}, {name}", us=us)
