"""The primitive against what others do for the same job, in the same run."""

from __future__ import annotations

import torch

import zorba_kernels as zk
from benchmarks.gpu_check.passes import EPS, count_of
from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.serving import fast_backends
from benchmarks.gpu_check.sizes import Sizes
from benchmarks.gpu_check.timing import (
    Call,
    Times,
    flat_weights,
    record_passes,
    synchronize,
    time_in_turn,
)
from benchmarks.peers import mezo, mezo_compiled


def run(report: Report, device: torch.device, sizes: Sizes) -> None:
    flat, weights = flat_weights(sizes.matrices(), device)
    flat_out = torch.empty_like(flat)
    table = zk.ParamTable(weights)
    parameters = list(weights.values())
    # MeZO's pass puts new tensors in the place of the old: it gets parameters of its own.
    own = [torch.nn.Parameter(w.clone(), requires_grad=False) for w in parameters]
    calls: dict[str, Call] = {
        "copy": lambda: flat_out.copy_(flat),
        "MeZO": lambda: mezo.perturb(own, 1, 1.0, EPS),
        "MeZO, compiled": lambda: mezo_compiled.perturb(parameters, 1, 1.0, EPS),
    }
    if device.type == "cuda":  # Triton compiles for no CPU
        from benchmarks.peers import tl_randn

        calls["tl.randn"] = lambda: tl_randn.perturb(parameters, 1, EPS)
    for b in fast_backends(device):
        for d in ("gaussian", "rademacher"):
            calls[f"{b}, {d}"] = lambda b=b, d=d: zk.add_noise_(table, 1, EPS, d, backend=b)
    for name in [n for n in calls if n != "copy"]:
        try:  # a peer that does not run here must not take the others with it
            calls[name]()
            synchronize(device)
        except Exception as error:
            del calls[name]
            report.note(**{f"{name}, left out": str(error)[:2000]})
    with report.part("speed against others"):
        times = time_in_turn(calls, device, sizes.runs, seconds=report.left())
        group = f"{count_of(flat.numel())} bf16 weights in place, against others"
        record_passes(report, group, times, flat.numel(), 2 * table.nbytes, device)
        record_ratios(report, times)


def record_ratios(report: Report, times: dict[str, Times]) -> None:
    """How many times as fast as each peer the primitive is."""
    peers = [name for name in times if name == "tl.randn" or name.startswith("MeZO")]
    for name in [n for n in times if n != "copy" and n not in peers]:
        ratios = {f"x_{p}": times[p].median / times[name].median for p in peers}
        report.measure("times as fast as others", name, **ratios)
