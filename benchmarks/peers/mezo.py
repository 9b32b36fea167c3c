"""MeZO's pass over the weights, as published.

From github.com/princeton-nlp/MeZO, large_models/trainer.py: ``zo_perturb_parameters`` seeds
torch's generator and adds ``scaling_factor * z * eps`` to each
parameter, with z of ``torch.normal``.
"""

from __future__ import annotations

from collections.abc import Iterable

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
