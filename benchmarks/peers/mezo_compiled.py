"""MeZO's pass through ``torch.compile``: what a user gets without writing a kernel.

The update in place is one fused kernel a tensor, noise included; seeding stays outside, because it
breaks the graph. ``randn_like`` draws what ``torch.normal`` draws, and fuses.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor


def add_normal(p: Tensor, scale: float, eps: float) -> None:
    """Adds ``scale * z * eps`` to a tensor."""
    p.add_(scale * torch.randn_like(p) * eps)


@cache
def compiled(backend: str) -> object:
    """``add_normal``, compiled once a process; each shape is compiled on its own."""
    return torch.compile(add_normal, backend=backend, dynamic=False)


def perturb(
    parameters: Iterable[Tensor], seed: int, scale: float, eps: float, backend: str = "inductor"
) -> None:
    """Adds ``scale * z * eps`` to every tensor."""
    torch.manual_seed(seed)
    for p in parameters:
        compiled(backend)(p, scale, eps)  # type: ignore[operator]
