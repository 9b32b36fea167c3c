"""bfloat16 weights over many steps: stochastic rounding follows float32, nearest does not.

A small Llama is trained with AdamW on sequences with strides of 1 to 3, and then fine-tuned without
gradients to a stride of 5, at a learning rate whose updates are a quarter of a bfloat16 step of a
typical weight. Start, batches and noise are the same for all runs of a seed.

    python -m benchmarks.rounding_curves
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from zorba import ZerothOrderSGD, machine

from benchmarks.experiment import picture
from benchmarks.sizes import llama_config

VOCABULARY, LENGTH, BATCH = 32, 12, 32
STEPS, SEEDS, LR = 2000, (1, 2, 3), 1e-5
PICTURE, RESULT = Path("docs/images/rounding.png"), Path("benchmarks/results/rounding.json")
RUNS: dict[str, tuple[torch.dtype, Any, str]] = {
    "float32": (torch.float32, "nearest", "#555555"),
    "bfloat16, stochastic": (torch.bfloat16, "stochastic", "#1f77b4"),
    "bfloat16, nearest": (torch.bfloat16, "nearest", "#d62728"),
}
"""Dtype, rounding and colour."""


def batch_of(step: int, strides: tuple[int, int]) -> Tensor:
    """Sequences of constant stride, one of ``strides[0] .. strides[1]``: int64 [BATCH, LENGTH]."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
    stride = torch.randint(strides[0], strides[1] + 1, (BATCH, 1), generator=generator)
    return (starts + stride * torch.arange(LENGTH)) % VOCABULARY


def pretrained(seed: int) -> Any:
    """A Llama of 0.1 M parameters that knows strides of 1 to 3; weights are exact in bfloat16."""
    torch.manual_seed(seed)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = llama_config(2, 64, 128, VOCABULARY, initializer_range=0.05, **heads)
    # Rounded before the training too: the published figures began so.
    model = LlamaForCausalLM(config).to(torch.bfloat16).float().eval()
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(400):
        ids = batch_of(step, (1, 3))
        adam.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()
    return model.to(torch.bfloat16).to(torch.float32)


def train(name: str, base: Any, seed: int) -> list[float]:
    dtype, rounding, _ = RUNS[name]
    model = copy.deepcopy(base).to(dtype)
    options: dict[str, Any] = {"distribution": "rademacher", "rounding": rounding, "seed": seed}
    optimizer = ZerothOrderSGD(model, lr=LR, eps=1e-2, **options)
    losses = []
    for step in range(STEPS):
        ids = batch_of(seed * STEPS + step, (5, 5))
        loss = optimizer.step(lambda ids=ids: model(input_ids=ids, labels=ids).loss)  # type: ignore[misc]
        losses.append(float(loss))
    return losses


def draw(path: Path, losses: dict[str, list[list[float]]]) -> None:
    with picture(path, 7, 4) as (axes,):
        for name, runs in losses.items():
            before = np.repeat(np.array(runs)[:, :1], 49, axis=1)
            padded = np.concatenate([before, runs], axis=1)
            smooth = np.lib.stride_tricks.sliding_window_view(padded, 50, axis=1).mean(axis=2)
            color, style = RUNS[name][2], "--" if name == "float32" else "-"
            axes.plot(smooth.T, color=color, linewidth=0.7, alpha=0.35)
            axes.plot(smooth.mean(axis=0), style, color=color, linewidth=2, label=name)
        title = "Rounding of updates to bfloat16 weights"
        axes.set(xlabel="step", ylabel="training loss", title=title)


def main() -> None:
    torch.set_num_threads(1)
    losses: dict[str, list[list[float]]] = {name: [] for name in RUNS}
    for seed in SEEDS:
        base = pretrained(seed)
        for name, runs in losses.items():
            runs.append(train(name, base, seed))
            print(f"seed {seed}, {name}: done", flush=True)
    report: dict[str, Any] = {"machine": machine.describe(), "lr": LR, "runs": {}}
    exact = np.mean(losses["float32"], axis=1)
    for name, runs in losses.items():
        ratios = (np.mean(runs, axis=1) / exact).tolist()
        ends = np.mean(np.array(runs)[:, -100:], axis=1).tolist()
        report["runs"][name] = {"area_over_float32": ratios, "mean_of_the_last_100": ends}
        said = ", ".join(f"{r:.4f}" for r in ratios)
        print(f"{name:22} area over float32's: {said}; loss at the end {np.mean(ends):.3f}")
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    draw(PICTURE, losses)


if __name__ == "__main__":
    main()
