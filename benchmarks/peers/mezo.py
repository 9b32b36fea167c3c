"""MeZO (arXiv 2305.17333): its pass over the weights and its step, as published.

From github.com/princeton-nlp/MeZO, large_models/trainer.py: ``zo_perturb_parameters`` seeds
torch's generator and adds ``scaling_factor * z * eps`` to each parameter, with z of
``torch.normal``; ``zo_step`` and ``zo_update`` make four such passes a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.peers.method import Message, Work, seed_of


def normal_like(p: Tensor) -> Tensor:
    return torch.normal(mean=0, std=1, size=p.size(), device=p.device, dtype=p.dtype)


def perturb(parameters: Iterable[Tensor], seed: int, scale: float, eps: float) -> None:
    torch.manual_seed(seed)
    for p in parameters:
        z = normal_like(p.data)
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
            z = normal_like(p.data)
            p.data = p.data - lr * (projected_grad * z)
    return float(plus)


@dataclass
class SingleMachine:
    """One machine that holds all the data, as a federation of one: there is nobody to send to."""

    work: Work  # of one client
    lr: float
    eps: float = 1e-3
    seed: int = 0  # from which the seeds of steps are drawn

    def begin(self, round_: int, clients: Sequence[str]) -> dict[str, Message]:
        return {client: Message(None) for client in clients}

    def local(self, client: str, round_: int, message: Message) -> Message:
        """Takes a step of the global model itself, which stays."""
        loss = partial(self.work.loss, self.work.batch(client, round_, 0))
        parameters: list[Tensor] = list(self.work.model.parameters())
        seed = seed_of(self.seed, round_)
        return Message(None, loss=step(parameters, loss, seed, self.eps, self.lr))

    def aggregate(self, round_: int, replies: Mapping[str, Message]) -> None:
        """Does nothing."""


# --- The same pass through torch.compile: what a user gets without writing a kernel ---------------


def add_normal(p: Tensor, scale: float, eps: float) -> None:
    """Adds ``scale * z * eps`` to a tensor; ``randn_like`` draws what ``torch.normal`` draws."""
    p.add_(scale * torch.randn_like(p) * eps)


@cache
def _compiled(backend: str) -> Callable[[Tensor, float, float], None]:
    return torch.compile(add_normal, backend=backend, dynamic=False)


def perturb_compiled(
    parameters: Iterable[Tensor], seed: int, scale: float, eps: float, backend: str = "inductor"
) -> None:
    """Adds ``scale * z * eps`` to every tensor: one fused kernel each, noise included."""
    torch.manual_seed(seed)  # outside, because it would break the graph
    for p in parameters:
        _compiled(backend)(p, scale, eps)
