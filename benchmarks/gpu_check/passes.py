"""One pass over bf16 weights against a copy of the same bytes, and what a step costs in all."""

from __future__ import annotations

import torch

import zorba_kernels as zk
from benchmarks.gpu_check.build import nvidia_smi
from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.serving import fast_backends
from benchmarks.gpu_check.sizes import Shapes, Sizes
from benchmarks.gpu_check.timing import (
    Call,
    flat_weights,
    host_seconds,
    record_passes,
    release,
    time_in_turn,
)
from zorba_kernels.noise import DISTRIBUTIONS, ROUNDINGS

EPS = 1e-3
OF_COPY = {"gaussian": 0.90, "rademacher": 0.97}  # targets: share of the copy's speed
STEP_MS = 40.0  # target: perturb, flip, restore and update 13 B weights


def run(report: Report, device: torch.device, sizes: Sizes) -> None:
    for title, shapes, apart in (
        ("matrices of 4096 x 4096", sizes.matrices(), True),
        ("shaped like a 7B model", sizes.model_7b(), False),
    ):
        with report.part(f"one pass, {title}"):
            one_pass(report, device, title, shapes, sizes.runs, apart)
        release(device)
    with report.part("a step of 13 B weights"):
        step(report, device, sizes)
    release(device)
    host(report, device, sizes.calls)


def one_pass(
    report: Report, device: torch.device, title: str, shapes: Shapes, runs: int, apart: bool
) -> None:
    """In place, and ``apart`` also to another table. The copy reads and writes as much."""
    flat, weights = flat_weights(shapes, device)
    flat_out = torch.empty_like(flat)
    pieces = flat_out.split([w.numel() for w in weights.values()])
    views = {n: p.view(w.shape) for (n, w), p in zip(weights.items(), pieces, strict=True)}
    table, out = zk.ParamTable(weights), zk.ParamTable(views)
    calls: dict[str, Call] = {"copy": lambda: flat_out.copy_(flat)}
    backends = fast_backends(device)
    for b in backends:
        for d in DISTRIBUTIONS:
            for r in ROUNDINGS:
                calls[f"{b}, {d}, {r}, in place"] = lambda b=b, d=d, r=r: zk.add_noise_(
                    table, 1, EPS, d, r, backend=b
                )
                if apart:
                    calls[f"{b}, {d}, {r}, out of place"] = lambda b=b, d=d, r=r: zk.add_noise(
                        table, out, 1, EPS, d, r, backend=b
                    )
    times = time_in_turn(calls, device, runs, seconds=report.left() / 2)
    group = f"one pass over {count_of(flat.numel())} bf16 weights, {title}"
    report.note(**{f"nvidia_smi after {title}": nvidia_smi()})
    record_passes(report, group, times, flat.numel(), 2 * table.nbytes, device)
    for b in backends:
        for d, bound in OF_COPY.items():
            share = times["copy"].median / times[f"{b}, {d}, nearest, in place"].median
            name = f"{b}, {d}, nearest, in place, {title}"
            report.target(name, share, bound, "of the copy's speed", least=True)

    prints = {b: lambda b=b: zk.fingerprint(table, backend=b) for b in backends}
    for b, t in time_in_turn(prints, device, runs, seconds=report.left() / 2).items():
        gb = table.nbytes / t.median / 1e9
        report.measure(f"fingerprint, {title}", b, ms=t.median * 1e3, gb_per_s=gb)


def step(report: Report, device: torch.device, sizes: Sizes) -> None:
    """What a step of central differences does besides forward passes, 13 B weights."""
    flat, weights = flat_weights(sizes.model_13b(), device)
    table = zk.ParamTable(weights)
    half = flat.numel() // 2

    def copies() -> None:
        # Three passes: each half goes to the other's place, so that 26 GB are enough.
        for _ in range(3):
            flat[:half].copy_(flat[half : 2 * half])
            flat[half : 2 * half].copy_(flat[:half])

    def passes(distribution: str, backend: str) -> None:
        for coef in (EPS, -2 * EPS, EPS - 1e-6):
            zk.add_noise_(table, 1, coef, distribution, backend=backend)

    calls: dict[str, Call] = {"three copies": copies}
    for b in fast_backends(device):
        for d in DISTRIBUTIONS:
            calls[f"{b}, {d}"] = lambda b=b, d=d: passes(d, b)
    times = time_in_turn(calls, device, sizes.runs, seconds=report.left() / 2)
    group = f"perturb, flip, restore and update {count_of(flat.numel())} bf16 weights"
    record_passes(
        report, group, times, flat.numel(), 3 * 2 * table.nbytes, device, copy="three copies"
    )
    for name, t in times.items():
        if name != "three copies":
            title = f"step of 13 B weights, {name}"
            report.target(title, t.median * 1e3, STEP_MS, "ms", least=False)


def host(report: Report, device: torch.device, calls: int) -> None:
    """What a call costs the host, on tables too small to take the device any time."""
    for tensors in (1, 291):
        group = f"host time of a call, {tensors} tensors"
        for name, call in small_calls(device, tensors).items():
            report.measure(group, name, us=host_seconds(call, device, calls) * 1e6)


def small_calls(device: torch.device, tensors: int) -> dict[str, Call]:
    """Calls on tables of 64 weights a tensor."""
    table, out = (
        zk.ParamTable(
            {f"{i}": torch.zeros(64, dtype=torch.bfloat16, device=device) for i in range(tensors)}
        )
        for _ in range(2)
    )
    calls: dict[str, Call] = {}
    for b in fast_backends(device):
        calls[f"{b}, in place"] = lambda b=b: zk.add_noise_(table, 1, EPS, backend=b)
        calls[f"{b}, out of place"] = lambda b=b: zk.add_noise(table, out, 1, EPS, backend=b)
        calls[f"{b}, 8 terms"] = lambda b=b: zk.add_noise_(table, range(8), [EPS] * 8, backend=b)
    return calls


def count_of(weights: int) -> str:
    """A number of weights as people say it."""
    return f"{weights / 1e9:.1f} B" if weights >= 1e9 else f"{weights / 1e6:.3g} M"
