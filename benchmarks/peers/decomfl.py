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
from functools import partial

import numpy as np

from benchmarks.peers.method import InPlaceWeights, Message, Work, seed_of

SEED_BYTES, SCALAR_BYTES = 8, 4


@dataclass(frozen=True)
class Round:
    """What the server keeps of a round."""

    seeds: list[int]  # uint64 [K]
    scalars: np.ndarray  # float32 [K, P], means over the clients


@dataclass(frozen=True)
class Pull:
    """The server's message: rounds ``first``, ``first + 1``, ..., and seeds of the new steps."""

    first: int
    rounds: list[Round]
    seeds: list[int]

    @property
    def nbytes(self) -> int:
        rounds = sum(SCALAR_BYTES * r.scalars.size + SEED_BYTES * len(r.seeds) for r in self.rounds)
        return rounds + SEED_BYTES * len(self.seeds)


@dataclass
class DeComFL:
    """Server and clients on one shared replica; see ``benchmarks.peers.method.Method``."""

    work: Work
    lr: float  # step size eta
    eps: float = 1e-3  # smoothing parameter mu
    local_steps: int = 1  # K
    perturbations: int = 1  # P
    seed: int = 0  # from which the seeds of rounds are drawn

    def __post_init__(self) -> None:
        self.weights = InPlaceWeights(self.work.model)
        self.history: list[Round] = []
        self.applied = 0  # rounds of the history that the replica has
        self._known = dict.fromkeys(self.work.sizes, 0)  # rounds that a client was sent

    def begin(self, round_: int, clients: Sequence[str]) -> dict[str, Message]:
        messages = {}
        for client in clients:
            first = self._known[client]
            pull = Pull(first, self.history[first:], self._seeds(round_))
            messages[client] = Message(pull, pull.nbytes)
            self._known[client] = len(self.history)
        return messages

    def local(self, client: str, round_: int, message: Message) -> Message:
        """Pulls, takes K local steps, and reverts them."""
        pull: Pull = message.content
        self.apply(pull.first, pull.rounds)
        scalars = np.zeros((len(pull.seeds), self.perturbations), dtype=np.float32)
        losses = []
        with self.weights.local_steps() as step:
            for k, seed in enumerate(pull.seeds):
                loss = partial(self.work.loss, self.work.batch(client, round_, k))
                scalars[k], base = self.weights.forward(loss, seed, self.eps, self.perturbations)
                step(*self._step(seed, scalars[k]))
                losses.append(base)
        return Message(scalars, SCALAR_BYTES * scalars.size, sum(losses) / len(losses))

    def aggregate(self, round_: int, replies: Mapping[str, Message]) -> None:
        mean = np.mean([reply.content for reply in replies.values()], axis=0, dtype=np.float64)
        self.history.append(Round(self._seeds(round_), mean.astype(np.float32)))
        self.apply(len(self.history) - 1, self.history[-1:])

    def apply(self, first: int, rounds: Sequence[Round]) -> None:
        """Takes those steps of the rounds ``first``, ... that the replica lacks, in order."""
        if first > self.applied:
            raise ValueError(f"the replica is at round {self.applied}, it got those from {first}")
        for entry in rounds[self.applied - first :]:
            for seed, scalars in zip(entry.seeds, entry.scalars, strict=True):
                self.weights.add(*self._step(seed, scalars), range(len(scalars)))
            self.applied += 1

    def _seeds(self, round_: int) -> list[int]:
        return [seed_of(self.seed, round_, k) for k in range(self.local_steps)]

    def _step(self, seed: int, scalars: np.ndarray) -> tuple[list[int], list[float]]:
        """Terms of ``-lr / P * sum_p scalars[p] z(seed, p)``."""
        return [seed] * len(scalars), [-self.lr * float(g) / len(scalars) for g in scalars]
