"""Replaying 64 steps of SmolLM2-135M from their log, in one pass, step by step, and MeZO's way.

    python -m pytest benchmarks/bench_replay.py

One perturbation a step, bfloat16, stochastic rounding (MeZO's own pass rounds to nearest). The
model's 272 parameters have its shapes and random values.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zorba.log import Log, TrajectoryWriter, replay
from zorba.optim import NoiseTerms, step_seed

import zorba_kernels as zk
from benchmarks.bench import Bench
from benchmarks.peers import mezo
from benchmarks.sizes import flat_weights, shapes_of, smollm_config

STEPS = 64


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def bench_replay(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distribution: str
) -> None:
    _, weights = flat_weights(shapes_of(smollm_config()), bench.device)
    table = zk.ParamTable(weights)
    parameters = [torch.nn.Parameter(w.clone(), requires_grad=False) for w in weights.values()]
    path = tmp_path / "run.zot"
    with TrajectoryWriter.create(path, table, 1, distribution, "stochastic") as writer:
        for step in range(STEPS):  # nobody took these steps: only replaying them is measured
            writer.append(step, NoiseTerms.single(step_seed(1, step), 0, [1e-6]))
    log = Log.read(path)
    # The weights change all the time: what is measured needs no right base.
    monkeypatch.setitem(replay.__globals__, "check_base", lambda *_: (table,))

    def replayed(steps_a_pass: int) -> None:
        monkeypatch.setitem(replay.__globals__, "ROUNDS_A_PASS", steps_a_pass)
        replay(table, log, verify=False)

    calls = {
        "one pass": lambda: replayed(STEPS),
        "step by step": lambda: replayed(1),
        "MeZO, one step": lambda: mezo.perturb(parameters, 1, 1.0, 1e-6),
    }
    for name, t in bench.in_turn(calls).items():
        seconds = t.median if "MeZO" in name else t.median / STEPS
        group = f"a step of a replay of SmolLM2-135M, bf16, {distribution}"
        bench.measure(group, name, ms=seconds * 1e3, ns_per_weight=seconds / table.numel * 1e9)
