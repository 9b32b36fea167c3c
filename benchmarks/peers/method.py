"""What a federated method is to the loop that compares them, and what it is given to work on.

Zeroth-order methods of peers hold all weights resident and perturb them in place. The noise is this
project's, not torch's, so that neither speed nor memory of a peer suffers from its generator: a
pass allocates nothing. The distribution is that of the papers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import zorba_kernels as zk


@dataclass(frozen=True)
class Message:
    """What travels between server and client."""

    content: Any  # what the receiver gets
    numbers: int = 0  # bytes that the method's paper counts: seeds, scalars, adapters
    loss: float = float("nan")  # mean of the losses that a client saw: it costs no bytes
    frame: int = 0  # bytes around the numbers, of a method that has an encoding of its own

    @property
    def encoded(self) -> int:
        return self.numbers + self.frame


@dataclass(frozen=True)
class Work:
    """A federation's model, which all clients share, and data; the same for every method."""

    model: nn.Module  # in evaluation mode, all parameters trainable
    loss: Callable[[Any], Tensor]  # scalar loss of the model on a batch, as it is now
    batch: Callable[[str, int, int], Any]  # of client, round (from 1) and step alone
    sizes: Mapping[str, int]  # examples that each client trains on
    losses: Callable[[Any], Tensor] | None = None  # of each example, where they can be told apart

    def shares(self, clients: Iterable[str]) -> dict[str, float]:
        """Returns the share of each of some clients in the examples of all of these."""
        sizes = {client: self.sizes[client] for client in clients}
        return {client: size / sum(sizes.values()) for client, size in sizes.items()}


class Method(Protocol):
    """A federated method: a round is ``begin``, ``local`` of each client, ``aggregate``.

    Between these calls the model holds the weights that the server's last round left.
    """

    def begin(self, round_: int, clients: Sequence[str]) -> Mapping[str, Message]:
        """Returns the server's message to each client that takes part in the round (from 1)."""

    def local(self, client: str, round_: int, message: Message) -> Message:
        """Does a client's local work; returns its answer and leaves the replica as it was."""

    def aggregate(self, round_: int, replies: Mapping[str, Message]) -> None:
        """The server's step: puts the weights of the next round into the replica."""


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
        """Gives a function that adds terms, sample k the k-th; all are reverted at the end."""
        taken: list[tuple[Sequence[int], Sequence[float]]] = []

        def step(seeds: Sequence[int], coefs: Sequence[float]) -> None:
            self.add(seeds, coefs, range(len(seeds)))
            taken.append((seeds, coefs))

        yield step
        for seeds, coefs in reversed(taken):  # weights come back to rounding
            self.add(seeds, [-c for c in coefs], range(len(seeds)))

    @torch.no_grad()
    def central(self, loss: Callable[[], Tensor], seed: int, eps: float) -> tuple[float, float]:
        """Returns ``(F(w + eps z) - F(w - eps z)) / 2 eps`` and the mean of both losses."""
        self.add([seed], [eps])
        plus = float(loss())
        self.add([seed], [-2 * eps])
        minus = float(loss())
        self.add([seed], [eps])
        return (plus - minus) / (2 * eps), (plus + minus) / 2

    @torch.no_grad()
    def forward(
        self, loss: Callable[[], Tensor], seed: int, eps: float, count: int
    ) -> tuple[list[float], float]:
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
