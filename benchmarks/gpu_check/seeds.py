"""64 seeds in one pass over the weights against 64 passes: equal bits, and how much faster."""

from __future__ import annotations

import torch
from torch import Tensor

import zorba_kernels as zk
from benchmarks.gpu_check.bits import assert_equal_bits
from benchmarks.gpu_check.passes import count_of
from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.serving import fast_backends, fresh
from benchmarks.gpu_check.sizes import Sizes
from benchmarks.gpu_check.timing import Call, flat_weights, release, time_in_turn
from zorba_kernels.noise import DISTRIBUTIONS

SEEDS = 64
FASTER = 10.0  # target of Rademacher


def run(report: Report, device: torch.device, sizes: Sizes) -> None:
    rng = fresh(report)
    seeds = [rng.getrandbits(64) for _ in range(SEEDS)]
    coefs = [rng.gauss(0.0, 1e-4) for _ in range(SEEDS)]
    flat, weights = flat_weights(sizes.many_seeds(), device)
    for distribution in DISTRIBUTIONS:
        same_bits(report, device, flat, weights, seeds, coefs, distribution)
    release(device)
    table = zk.ParamTable(weights)
    for distribution in DISTRIBUTIONS:
        for b in fast_backends(device):
            with report.part(f"speed of 64 seeds, {b}, {distribution}"):
                speed(report, device, table, seeds, coefs, distribution, b, sizes.runs)


def same_bits(
    report: Report,
    device: torch.device,
    flat: Tensor,
    weights: dict[str, Tensor],
    seeds: list[int],
    coefs: list[float],
    distribution: str,
) -> None:
    def copied(like: Tensor) -> tuple[Tensor, zk.ParamTable]:
        fresh_flat = like.clone()
        pieces = fresh_flat.split([w.numel() for w in weights.values()])
        return fresh_flat, zk.ParamTable(dict(zip(weights, pieces, strict=True)))

    for b in fast_backends(device):
        title = f"{b}: 64 rounds of one term = 64 passes, {distribution}"
        with report.check(title, elements=flat.numel()):
            one, one_table = copied(flat)
            many, many_table = copied(flat)
            zk.add_noise_(one_table, seeds, coefs, distribution, rounds=[1] * SEEDS, backend=b)
            for seed, coef in zip(seeds, coefs, strict=True):
                zk.add_noise_(many_table, seed, coef, distribution, backend=b)
            assert_equal_bits(one, many, f"{b}, 64 rounds against 64 passes")
    on_cpu, cpu_table = copied(flat.cpu())
    zk.add_noise_(cpu_table, seeds, coefs, distribution, backend="cpu")
    expected = on_cpu.to(device)
    for b in fast_backends(device):
        title = f"{b}: one round of 64 terms = cpu, {distribution}"
        with report.check(title, elements=flat.numel()):
            mine, mine_table = copied(flat)
            zk.add_noise_(mine_table, seeds, coefs, distribution, backend=b)
            assert_equal_bits(mine, expected, f"{b}, one round of 64 terms")


def speed(
    report: Report,
    device: torch.device,
    table: zk.ParamTable,
    seeds: list[int],
    coefs: list[float],
    distribution: str,
    backend: str,
    runs: int,
) -> None:
    def passes() -> None:
        for seed, coef in zip(seeds, coefs, strict=True):
            zk.add_noise_(table, seed, coef, distribution, backend=backend)

    calls: dict[str, Call] = {
        "64 passes": passes,
        "one pass, one round": lambda: zk.add_noise_(
            table, seeds, coefs, distribution, backend=backend
        ),
        "one pass, 64 rounds": lambda: zk.add_noise_(
            table, seeds, coefs, distribution, rounds=[1] * SEEDS, backend=backend
        ),
    }
    times = time_in_turn(calls, device, runs, seconds=report.left())
    group = f"64 seeds over {count_of(table.numel)} bf16 weights, {backend}, {distribution}"
    for name, t in times.items():
        faster = times["64 passes"].median / t.median
        report.measure(group, name, ms=t.median * 1e3, times_as_fast_as_64_passes=faster)
        if name != "64 passes" and distribution == "rademacher":
            report.target(
                f"{backend}, {distribution}, 64 seeds in {name}",
                faster,
                FASTER,
                "times as fast as 64 passes",
                least=True,
            )
