"""FedKSeed: zeroth-order federated tuning with a finite pool of seeds (arXiv 2312.06353).

Algorithm 1. Server and clients share K candidate seeds, made from one; the server keeps one
accumulated scalar a seed, A. A client downloads A and computes the global model
``w = w_0 - lr * sum_j A[j] z(seed_j)``. Then it takes tau local steps; each draws a seed of the
pool, measures a central difference and steps along that seed's noise. It uploads tau pairs of seed
index and scalar. The server adds them to A, each client weighted by its share of the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks.peers.method import InPlaceWeights, Message, Work, seed_of

SCALAR_BYTES = INDEX_BYTES = POOL_SEED_BYTES = 4


@dataclass
class FedKSeed:
    """Server and clients on one shared replica; see ``benchmarks.peers.method.Method``."""

    work: Work
    lr: float  # constant: the model is a function of A
    eps: float = 1e-3
    pool: int = 1024  # K, number of candidate seeds
    local_steps: int = 1  # tau
    seed: int = 0  # from which the pool and the clients' draws are made

    def __post_init__(self) -> None:
        self.weights = InPlaceWeights(self.work.model)
        self.seeds = [seed_of(self.seed, j) for j in range(self.pool)]
        self.accumulated = np.zeros(self.pool)
        self._applied = np.zeros(self.pool)  # what the replica carries

    def begin(self, round_: int, clients: Sequence[str]) -> dict[str, Message]:
        nbytes = POOL_SEED_BYTES + SCALAR_BYTES * self.pool
        return {client: Message(self.accumulated.copy(), nbytes) for client in clients}

    def local(self, client: str, round_: int, message: Message) -> Message:
        self._pull(message.content)
        rng = np.random.default_rng([self.seed, round_, *client.encode()])
        losses, pairs = [], []
        with self.weights.local_steps() as step:
            for k in range(self.local_steps):
                j = int(rng.integers(self.pool))
                loss = partial(self.work.loss, self.work.batch(client, round_, k))
                scalar, mean = self.weights.central(loss, self.seeds[j], self.eps)
                step([self.seeds[j]], [-self.lr * scalar])
                pairs.append((j, scalar))
                losses.append(mean)
        return Message(pairs, (INDEX_BYTES + SCALAR_BYTES) * len(pairs), sum(losses) / len(losses))

    def aggregate(self, round_: int, replies: Mapping[str, Message]) -> None:
        """``A[j] += sum_i c_i g_i[j]``, c_i the client's share of the examples."""
        for client, share in self.work.shares(replies).items():
            for j, scalar in replies[client].content:
                self.accumulated[j] += scalar * share
        self._pull(self.accumulated)

    def _pull(self, accumulated: np.ndarray) -> None:
        """Brings the replica to ``w_0 - lr * sum_j accumulated[j] z(seed_j)``."""
        # By the change, as the paper's own simulation does: the same but for float32 rounding.
        change = accumulated - self._applied
        moved = np.flatnonzero(change)
        self.weights.add([self.seeds[j] for j in moved], (-self.lr * change[moved]).tolist())
        self._applied = accumulated.copy()
