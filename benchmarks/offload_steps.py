"""Time of a step with idle blocks on the host over that of a resident one, taken in turn.

python -m benchmarks.offload_steps [--runs N] [--active N] [--out FILE]

A model of SmolLM2-135M's shapes with random weights, 16 sequences of 32 tokens, the logits of the
last position read, Rademacher noise, central differences, P = 1; active blocks are spread evenly.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from zorba import ZerothOrderSGD, machine
from zorba.hf.head import narrow_logits
from zorba.offload import Offload

from benchmarks.gpu_check.timing import time_in_turn

LAYERS = 30


def make_model(dtype: torch.dtype) -> nn.Module:
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=LAYERS,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def make_step(model: Any, mask: list[bool]) -> Callable[[], object]:
    """Returns a step on one batch."""
    ids = torch.randint(0, 49152, (16, 32), generator=torch.Generator().manual_seed(1))
    rows, answers = torch.arange(16), torch.arange(16) % 2
    words = torch.tensor([1000, 2000])

    def loss() -> torch.Tensor:
        inputs = {"input_ids": ids, "use_cache": False}
        logits = narrow_logits(model, inputs, rows, torch.full((16,), 31), words)
        return nn.functional.cross_entropy(logits, answers)

    optimizer = ZerothOrderSGD(model, lr=1e-6, blocks=mask, distribution="rademacher")
    return lambda: optimizer.step(loss)


def measure(dtype: torch.dtype, active: int, runs: int) -> dict[str, float]:
    """Returns medians in milliseconds, and their ratio."""
    chosen = {(2 * i + 1) * LAYERS // (2 * active) for i in range(active)}
    mask = [b in chosen for b in range(LAYERS)]
    resident = make_model(dtype)
    model = copy.deepcopy(resident)
    active_names = [f"model.layers.{b}" for b in sorted(chosen)]
    with (
        tempfile.TemporaryDirectory(dir=Path.cwd()) as folder,  # on a disk
        Offload(model, active_names, folder=folder),
    ):
        steps = {"resident": make_step(resident, mask), "offload": make_step(model, mask)}
        times = time_in_turn(steps, torch.device("cpu"), runs, seconds=3600.0)
    row = {"active": float(active)}
    for name, t in times.items():
        row |= {f"{name}_ms": 1e3 * t.median, f"{name}_least_ms": 1e3 * t.least}
    row["ratio"] = row["offload_ms"] / row["resident_ms"]
    row["least_ratio"] = row["offload_least_ms"] / row["resident_least_ms"]
    return row


def main() -> None:
    """Prints a line a dtype and number of active blocks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--active", type=int, nargs="+", default=[8])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for active in given.active:
            name = f"{str(dtype).removeprefix('torch.')}, {active} of {LAYERS} active"
            rows[name] = measure(dtype, active, given.runs)
            shown = "  ".join(f"{key} {value:.4g}" for key, value in rows[name].items())
            print(f"{name}: {shown}", flush=True)
    if given.out is not None:
        content = {"machine": machine.describe(), "runs": given.runs, "steps": rows}
        given.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
