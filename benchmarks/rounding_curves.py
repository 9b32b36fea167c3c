"""bfloat16 weights over many steps: stochastic rounding follows float32, nearest does not.

A small Llama is trained with AdamW on sequences with strides of 1 to 3, and then fine-tuned without
gradients to a stride of 5, at a learning rate whose updates are a quarter of a bfloat16 step of a
typical weight. Start, batches and noise are the same for all runs of a seed.

    python -m benchmarks.rounding_curves [--steps 2000] [--out docs/images/rounding.png]
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from zorba import ZerothOrderSGD, machine

VOCABULARY, LENGTH, BATCH = 32, 12, 32
RUNS: dict[str, tuple[torch.dtype, str]] = {
    "float32": (torch.float32, "nearest"),
    "bfloat16, stochastic": (torch.bfloat16, "stochastic"),
    "bfloat16, nearest": (torch.bfloat16, "nearest"),
}
COLORS = {"float32": "#555555", "bfloat16, stochastic": "#1f77b4", "bfloat16, nearest": "#d62728"}


def make_model(seed: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama of 0.1 M parameters whose initial weights are exact in bfloat16."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.05,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).to(dtype).eval()


def batch_of(step: int, strides: tuple[int, int]) -> Tensor:
    """Sequences of constant stride, one of ``strides[0] .. strides[1]``: int64 [BATCH, LENGTH]."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
    stride = torch.randint(strides[0], strides[1] + 1, (BATCH, 1), generator=generator)
    return (starts + stride * torch.arange(LENGTH)) % VOCABULARY


def pretrained(seed: int) -> LlamaForCausalLM:
    """A model that knows strides of 1 to 3; its weights are exact in bfloat16."""
    model = make_model(seed, torch.float32)
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(400):
        ids = batch_of(step, (1, 3))
        adam.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()
    return model.to(torch.bfloat16).to(torch.float32)


def train(name: str, base: LlamaForCausalLM, seed: int, steps: int, lr: float) -> list[float]:
    """Returns the loss of each step."""
    dtype, rounding = RUNS[name]
    model = copy.deepcopy(base).to(dtype)
    optimizer = ZerothOrderSGD(
        model,
        lr=lr,
        eps=1e-2,
        distribution="rademacher",
        rounding=rounding,  # type: ignore[arg-type]
        seed=seed,
    )
    losses = []
    for step in range(steps):
        ids = batch_of(seed * steps + step, (5, 5))
        loss = optimizer.step(lambda ids=ids: model(input_ids=ids, labels=ids).loss)  # type: ignore[misc]
        losses.append(float(loss))
    return losses


def draw(path: Path, curves: dict[str, list[list[float]]]) -> None:
    """Draws every run, smoothed over 50 steps, and the mean of each kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, runs in curves.items():
        smooth = [_smooth(run, 50) for run in runs]
        for run in smooth:
            axes.plot(run, color=COLORS[name], linewidth=0.7, alpha=0.35)
        mean = torch.tensor(smooth).mean(dim=0).tolist()
        style = "--" if name == "float32" else "-"
        axes.plot(mean, style, color=COLORS[name], linewidth=2, label=name)
    axes.set(xlabel="step", ylabel="training loss", title="Rounding of updates to bfloat16 weights")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _smooth(values: list[float], width: int) -> list[float]:
    kernel = torch.full((1, 1, width), 1 / width)
    padded = torch.nn.functional.pad(torch.tensor(values)[None, None], (width - 1, 0), "replicate")
    smooth: list[float] = torch.nn.functional.conv1d(padded, kernel)[0, 0].tolist()
    return smooth


def main() -> None:
    """Trains, prints the areas under the curves and writes picture and figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--out", type=Path, default=Path("docs/images/rounding.png"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/rounding.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    curves: dict[str, list[list[float]]] = {name: [] for name in RUNS}
    for seed in range(1, 1 + arguments.seeds):
        base = pretrained(seed)
        for name, runs in curves.items():
            runs.append(train(name, base, seed, arguments.steps, arguments.lr))
            print(f"seed {seed}, {name}: done", flush=True)
    report: dict[str, Any] = {"machine": machine.describe(), "lr": arguments.lr, "runs": {}}
    for name, runs in curves.items():
        areas = [sum(run) / len(run) for run in runs]
        ratios = [a / sum(b) * len(b) for a, b in zip(areas, curves["float32"], strict=True)]
        ends = [sum(run[-100:]) / 100 for run in runs]
        report["runs"][name] = {"area_over_float32": ratios, "mean_of_the_last_100": ends}
        said = ", ".join(f"{r:.4f}" for r in ratios)
        print(f"{name:22} area over float32's: {said}; loss at the end {sum(ends) / len(ends):.3f}")
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    draw(arguments.out, curves)


if __name__ == "__main__":
    main()
