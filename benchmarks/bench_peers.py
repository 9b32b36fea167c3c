"""The primitive against what others do for the same job, in the same run.

python -m pytest benchmarks/bench_peers.py
"""

from __future__ import annotations

import itertools
from functools import partial

import torch

import zorba_kernels as zk
from benchmarks.bench import Bench, synchronize
from benchmarks.bench_passes import EPS, limits
from benchmarks.peers import mezo
from benchmarks.sizes import count_of, flat_weights
from zorba_kernels.noise import DISTRIBUTIONS


def bench_peers(bench: Bench, compared_title: str) -> None:
    flat, weights = flat_weights(bench.sizes.tables[compared_title](), bench.device)
    table, parameters = zk.ParamTable(weights), list(weights.values())
    # MeZO's pass puts new tensors in the place of the old: it gets parameters of its own.
    own = [torch.nn.Parameter(w.clone(), requires_grad=False) for w in parameters]
    compiled = partial(mezo.perturb_compiled, parameters, 1, 1.0, EPS, bench.sizes.compiler)
    peers = {"MeZO": partial(mezo.perturb, own, 1, 1.0, EPS), "MeZO, compiled": compiled}
    if bench.device.type == "cuda":  # Triton compiles for no CPU
        from benchmarks.peers import tl_randn

        peers["tl.randn"] = partial(tl_randn.perturb, parameters, 1, EPS)
    for name in list(peers):
        try:  # a peer that does not run here must not take the others with it
            peers[name]()
            synchronize(bench.device)
        except Exception as error:
            del peers[name]
            bench.facts[f"{name}, left out"] = str(error)[:2000]
    mine = {
        f"{b}, {d}": partial(zk.add_noise_, table, 1, EPS, d, backend=b)
        for b, d in itertools.product(bench.backends, DISTRIBUTIONS)
    }
    times = bench.in_turn(limits(weights, flat, torch.empty_like(flat)) | peers | mine)
    group = f"{count_of(table.numel)} bf16 weights in place, {compared_title}, against others"
    bench.passes(group, times, table.numel, 2 * table.nbytes)
    for name in mine:
        ratios = {f"x {peer}": times[peer].median / times[name].median for peer in peers}
        bench.measure(f"times as fast as others, {compared_title}", name, **ratios)
