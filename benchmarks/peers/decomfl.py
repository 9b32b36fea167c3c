"""DeComFL: full-model zeroth-order federated learning with seeds and scalars (arXiv 2405.15861).

Algorithms 1 and 2. The server draws a seed for each of K local steps, shared by all clients. A
client first pulls: it applies the seeds and mean scalars of the rounds that it lacks. Then it takes
K local steps, each with the mean of P forward differences, reverts them and sends its K * P
scalars. The server averages scalars over clients, each weighing the same, and keeps them with
their seeds. No weight ever travels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.peers.in_place import InPlaceWeights, seed_of
from benchmarks.peers.method import Message, Work, bare

SEED_BYTES = 8
SCALAR_BYTES = 4


@dataclass(frozen=True)
class Round:
    """What the server keeps of a round: uint64 seeds [K], mean scalars float32 [K, P]."""

    seeds: tuple[int, ...]
    scalars: np.ndarray


@dataclass(frozen=True)
class Pull:
    """The server's message: rounds ``first``, ``first + 1``, ..., and seeds of the new steps."""

    first: int
    rounds: tuple[Round, ...]
    seeds: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all seeds and scalars."""
        scalars = sum(r.scalars.size for r in self.rounds)
        seeds = len(self.seeds) + sum(len(r.seeds) for r in self.rounds)
        return SCALAR_BYTES * scalars + SEED_BYTES * seeds


class DeComFL:
    """Server and clients on one shared replica; see ``benchmarks.peers.method.Method``.

    Args:
        work: model and data.
        lr: step size eta.
        eps: smoothing parameter mu.
        local_steps: K.
        perturbations: P.
        seed: from which the seeds of rounds are drawn.
    """

    def __init__(
        self,
        work: Work,
        lr: float,
        eps: float = 1e-3,
        local_steps: int = 1,
        perturbations: int = 1,
        seed: int = 0,
    ) -> None:
        self.work, self.lr, self.eps, self.seed = work, lr, eps, seed
        self.local_steps, self.perturbations = local_steps, perturbations
        self.weights = InPlaceWeights(work.model)
        self.history: list[Round] = []
        self.applied = 0  # rounds of the history that the replica has
        self._known = dict.fromkeys(work.clients, 0)  # rounds that a client was sent

    def begin(self, round_: int, clients: Sequence[str]) -> dict[str, Message]:
        """See ``Method``: seeds for the local steps, and all that the client lacks."""
        seeds = tuple(seed_of(self.seed, round_, k) for k in range(self.local_steps))
        messages = {}
        for client in clients:
            first = self._known[client]
            pull = Pull(first, tuple(self.history[first:]), seeds)
            messages[client] = bare(pull, pull.nbytes)
            self._known[client] = len(self.history)
        return messages

    def local(self, client: str, round_: int, message: Message) -> Message:
        """See ``Method``: pull, K local steps, revert."""
        pull: Pull = message.content
        self.apply(pull.first, pull.rounds)
        scalars = np.zeros((len(pull.seeds), self.perturbations), dtype=np.float32)
        losses = []
        with self.weights.local_steps() as step:
            for k, seed in enumerate(pull.seeds):
                batch = self.work.batch(client, round_, k)
                scalars[k], loss = self.weights.forward(
                    lambda batch=batch: self.work.loss(batch), seed, self.eps, self.perturbations
                )
                step(*self._step(seed, scalars[k]))
                losses.append(loss)
        return bare(scalars, SCALAR_BYTES * scalars.size, sum(losses) / len(losses))

    def aggregate(self, round_: int, replies: Mapping[str, Message]) -> None:
        """See ``Method``: the mean of the clients' scalars."""
        mean = np.mean([reply.content for reply in replies.values()], axis=0, dtype=np.float64)
        seeds = tuple(seed_of(self.seed, round_, k) for k in range(self.local_steps))
        self.history.append(Round(seeds, mean.astype(np.float32)))
        self.apply(len(self.history) - 1, self.history[-1:])

    def apply(self, first: int, rounds: Sequence[Round]) -> None:
        """Pulls: takes those steps of the rounds ``first``, ... that the replica lacks, in order.

        Raises:
            ValueError: rounds are missing in front of the first.
        """
        if first > self.applied:
            raise ValueError(f"the replica is at round {self.applied}, it got those from {first}")
        for entry in rounds[self.applied - first :]:
            for seed, scalars in zip(entry.seeds, entry.scalars, strict=True):
                seeds, coefs = self._step(seed, scalars)
                self.weights.add(seeds, coefs, range(len(seeds)))
            self.applied += 1

    def state(self) -> Any:
        """See ``Method``: the history, from which weights are rebuilt."""
        return [(entry.seeds, entry.scalars.tolist()) for entry in self.history]

    def restore(self, state: Any) -> None:
        """See ``Method``."""
        self.history = [Round(tuple(s), np.array(g, dtype=np.float32)) for s, g in state]
        self._known = dict.fromkeys(self._known, max(0, len(self.history) - 1))
        self.apply(0, self.history)

    def _step(self, seed: int, scalars: np.ndarray) -> tuple[list[int], list[float]]:
        """Terms of ``-lr / P * sum_p scalars[p] z(seed, p)``."""
        return [seed] * len(scalars), [-self.lr * float(g) / len(scalars) for g in scalars]
