"""Small models and what to compare of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from zorba import ZerothOrderSGD
from zorba.optim import Placement

from tests.tolerances import bound


class Tied(nn.Module):
    """Embedding, two layers, and a head that is the embedding: a weight with two owners."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 37, bias=False)
        self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(layer(hidden)))  # called twice in a forward
        return self.head(self.norm(hidden))


class Adapter(nn.Module):
    """A parameter of its own and a child that runs inside: nested owners."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 37, (4, 9), generator=generator)
    return ids, torch.randint(0, 37, (4, 9), generator=generator)


def loss_of(model: nn.Module, ids: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    logits = model(ids).float().flatten(0, 1)
    return nn.functional.cross_entropy(logits, labels.flatten(), reduction=reduction)


def task(
    generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> tuple[Tied, Callable[[], Tensor]]:
    model, (ids, labels) = Tied(dtype), batch(generator)
    return model, lambda: loss_of(model, ids, labels)


def failing(
    closure: Callable[[], Tensor], at: int, error: type[BaseException]
) -> Callable[[], Tensor]:
    """The closure, which raises at the end of its call number ``at``."""
    calls = itertools.count(1)

    def call() -> Tensor:
        loss = closure()
        if next(calls) == at:
            raise error("injected")
        return loss

    return call


def untouched(model: nn.Module) -> bool:
    return not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules()
    )


def scratch_bytes(optimizer: ZerothOrderSGD) -> int:
    """Bytes of the buffers that wait for the next forward."""
    return sum(buffer.numel() for free in optimizer.placement._free for buffer in free)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_bits(model: nn.Module, before: dict[str, Tensor]) -> bool:
    def bits(t: Tensor) -> Tensor:
        return t.detach().view(torch.int32 if t.element_size() == 4 else torch.int16)

    return all(torch.equal(bits(p), bits(before[n])) for n, p in model.named_parameters())


def assert_close(model: nn.Module, expected: dict[str, Tensor], tolerance: str) -> None:
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=0, atol=bound(tolerance))


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that grows by one with each pass that a placement makes from here on."""
    passes: list[int] = []
    plain = Placement._run
    monkeypatch.setattr(Placement, "_run", lambda *a: (passes.append(1), plain(*a))[1])
    return passes
