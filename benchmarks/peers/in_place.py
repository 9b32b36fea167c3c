"""Zeroth-order weights as the peers hold them: all resident, perturbed in place.

The noise is this project's, not torch's, so that neither speed nor memory of a peer suffers from
its generator: a pass allocates nothing. The distribution is that of the papers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

import zorba_kernels as zk

Loss = Callable[[], Tensor]


class InPlaceWeights:
    """All parameters of a model, embeddings and head among them, along standard normal noise."""

    def __init__(self, model: nn.Module) -> None:
        self.table = zk.ParamTable(model.named_parameters())

    def add(
        self, seeds: Sequence[int], coefs: Sequence[float], samples: Sequence[int] | None = None
    ) -> None:
        """``w += sum_k coefs[k] * z(seeds[k], samples[k])``, in one pass; samples are 0 if None."""
        if len(seeds):
            zk.add_noise_(self.table, seeds, coefs, "gaussian", samples=samples)

    @contextmanager
    def local_steps(self) -> Iterator[Callable[[Sequence[int], Sequence[float]], None]]:
        """Gives a function that adds terms, sample k being the k-th; all are reverted at the end.

        Reverting subtracts, so that weights come back to rounding.
        """
        taken: list[tuple[Sequence[int], Sequence[float]]] = []

        def step(seeds: Sequence[int], coefs: Sequence[float]) -> None:
            self.add(seeds, coefs, range(len(seeds)))
            taken.append((seeds, coefs))

        try:
            yield step
        finally:
            for seeds, coefs in reversed(taken):
                self.add(seeds, [-c for c in coefs], range(len(seeds)))

    @torch.no_grad()
    def central(self, loss: Loss, seed: int, eps: float) -> tuple[float, float]:
        """Returns ``(F(w + eps z) - F(w - eps z)) / 2 eps`` and the mean of both losses."""
        self.add([seed], [eps])
        plus = float(loss())
        self.add([seed], [-2 * eps])
        minus = float(loss())
        self.add([seed], [eps])
        return (plus - minus) / (2 * eps), (plus + minus) / 2

    @torch.no_grad()
    def forward(self, loss: Loss, seed: int, eps: float, count: int) -> tuple[list[float], float]:
        """Returns ``(F(w + eps z_p) - F(w)) / eps`` for samples p < count, and F(w)."""
        base = float(loss())
        scalars = []
        for p in range(count):
            self.add([seed], [eps], [p])
            scalars.append((float(loss()) - base) / eps)
            self.add([seed], [-eps], [p])
        return scalars, base


def seed_of(*parts: int) -> int:
    """Returns a uint64 that is a function of some numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])
