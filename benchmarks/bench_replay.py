"""Replaying 64 steps of SmolLM2-135M from its trajectory, step by step, and MeZO's way.

One perturbation a step, bfloat16, stochastic rounding (MeZO's own pass rounds to nearest). The
model's 272 parameters have its shapes and random values.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from zorba.log import Log, TrajectoryWriter, replay
from zorba.optim import NoiseTerms, step_seed

import zorba_kernels as zk
from benchmarks.peers import mezo

STEPS = 64
GROUP = "a step of a replay of SmolLM2-135M, bf16"


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of SmolLM2-135M's parameters."""
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (49152, 576)}
    for layer in range(30):
        for name, shape in (
            ("self_attn.q_proj", (576, 576)),
            ("self_attn.k_proj", (192, 576)),
            ("self_attn.v_proj", (192, 576)),
            ("self_attn.o_proj", (576, 576)),
            ("mlp.gate_proj", (1536, 576)),
            ("mlp.up_proj", (1536, 576)),
            ("mlp.down_proj", (576, 1536)),
            ("input_layernorm", (576,)),
            ("post_attention_layernorm", (576,)),
        ):
            out[f"model.layers.{layer}.{name}.weight"] = shape
    return out | {"model.norm.weight": (576,)}


@pytest.fixture(scope="module")
def table() -> zk.ParamTable:
    return zk.ParamTable(
        {n: torch.randn(shape).mul_(0.02).to(torch.bfloat16) for n, shape in shapes().items()}
    )


def record(path: Path, table: zk.ParamTable, distribution: str) -> Log:
    """Steps that nobody took: only replaying them is measured."""
    with TrajectoryWriter.create(path, table, 1, distribution, "stochastic") as writer:
        for step in range(STEPS):
            writer.append(step, NoiseTerms.single(step_seed(1, step), 0, [1e-6]))
    return Log.read(path)


@pytest.mark.benchmark(group=GROUP)
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("way", ["one_pass", "step_by_step"])
def bench_replay(
    measure: Callable[..., None],
    table: zk.ParamTable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    distribution: str,
    way: str,
) -> None:
    trajectory = record(tmp_path / "run.zot", table, distribution)
    # The weights change all the time: what is measured needs no right base.
    monkeypatch.setitem(replay.__globals__, "check_base", lambda *_: (table,))
    if way == "step_by_step":
        monkeypatch.setitem(replay.__globals__, "ROUNDS_A_PASS", 1)
    passes = 1 if way == "one_pass" else STEPS
    measure(
        lambda: replay(table, trajectory, verify=False),
        table.numel * STEPS,
        2 * table.nbytes * passes,
        3,
    )


@pytest.mark.benchmark(group=GROUP)
def bench_mezo(measure: Callable[..., None], table: zk.ParamTable) -> None:
    parameters = [torch.nn.Parameter(e.tensor.clone(), requires_grad=False) for e in table.entries]
    measure(lambda: mezo.perturb(parameters, 1, 1.0, 1e-6), table.numel, 2 * table.nbytes, 3)
