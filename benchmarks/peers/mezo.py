"""MeZO's pass over the weights and its step, as published.

From github.com/princeton-nlp/MeZO, large_models/trainer.py: ``zo_perturb_parameters`` seeds
torch's generator and adds ``scaling_factor * z * eps`` to each parameter, with z of
``torch.normal``; ``zo_step`` and ``zo_update`` make four such passes a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def perturb(parameters: Iterable[Tensor], seed: int, scale: float, eps: float) -> None:
    """Adds ``scale * z * eps`` to every tensor."""
    torch.manual_seed(seed)
    for p in parameters:
        z = torch.normal(
            mean=0, std=1, size=p.data.size(), device=p.data.device, dtype=p.data.dtype
        )
        p.data = p.data + scale * z * eps


def step(
    parameters: list[Tensor], closure: Callable[[], Tensor], seed: int, eps: float, lr: float
) -> float:
    """A step without weight decay: perturb, flip, restore and update; returns the loss at +eps."""
    with torch.no_grad():
        perturb(parameters, seed, 1, eps)
        plus = closure()
        perturb(parameters, seed, -2, eps)
        minus = closure()
        projected_grad = ((plus - minus) / (2 * eps)).item()
        perturb(parameters, seed, 1, eps)
        torch.manual_seed(seed)
        for p in parameters:
            z = torch.normal(
                mean=0, std=1, size=p.data.size(), device=p.data.device, dtype=p.data.dtype
            )
            p.data = p.data - lr * (projected_grad * z)
    return float(plus)
