"""FedKSeed: zeroth-order federated tuning with a finite pool of seeds (arXiv 2312.06353).

Algorithm 1. Server and clients share K candidate seeds, made from one; the server keeps one
accumulated scalar a seed, A. A client downloads A and computes the global model
``w = w_0 - lr * sum_j A[j] z(seed_j)``. Then it takes tau local steps; each draws a seed of the
pool, measures a central difference and steps along that seed's noise. It uploads tau pairs of seed
index and scalar. The server adds them to A, each client weighted by its share of the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.peers.in_place import InPlaceWeights, seed_of
from benchmarks.peers.method import Message, Work, bare

SCALAR_BYTES = 4
INDEX_BYTES = 4
POOL_SEED_BYTES = 4


class FedKSeed:
    """Server and clients on one shared replica; see ``benchmarks.peers.method.Method``.

    A client of the paper computes the model from w_0 every round. The shared replica moves by the
    change of A instead, which is the same but for float32 rounding, as does the paper's own
    simulation.

    Args:
        work: model and data.
        lr: learning rate, constant: the model is a function of A.
        eps: perturbation scale.
        pool: K, number of candidate seeds.
        local_steps: tau.
        seed: from which the pool and the clients' draws are made.
    """

    def __init__(
        self,
        work: Work,
        lr: float,
        eps: float = 1e-3,
        pool: int = 1024,
        local_steps: int = 1,
        seed: int = 0,
    ) -> None:
        self.work, self.lr, self.eps, self.seed = work, lr, eps, seed
        self.local_steps = local_steps
        self.weights = InPlaceWeights(work.model)
        self.pool = [seed_of(seed, j) for j in range(pool)]
        self.accumulated = np.zeros(pool)
        self._applied = np.zeros(pool)  # what the replica carries

    def begin(self, round_: int, clients: Sequence[str]) -> dict[str, Message]:
        """See ``Method``: the accumulated scalars, and the seed of the pool."""
        nbytes = POOL_SEED_BYTES + SCALAR_BYTES * len(self.pool)
        return {client: bare(self.accumulated.copy(), nbytes) for client in clients}

    def local(self, client: str, round_: int, message: Message) -> Message:
        """See ``Method``: tau local steps, then back."""
        self._pull(message.content)
        rng = np.random.default_rng([self.seed, round_, *client.encode()])
        losses, pairs = [], []
        with self.weights.local_steps() as step:
            for k in range(self.local_steps):
                j = int(rng.integers(len(self.pool)))
                batch = self.work.batch(client, round_, k)
                scalar, loss = self.weights.central(
                    lambda batch=batch: self.work.loss(batch), self.pool[j], self.eps
                )
                step([self.pool[j]], [-self.lr * scalar])
                pairs.append((j, scalar))
                losses.append(loss)
        nbytes = (INDEX_BYTES + SCALAR_BYTES) * len(pairs)
        return bare(pairs, nbytes, sum(losses) / len(losses))

    def aggregate(self, round_: int, replies: Mapping[str, Message]) -> None:
        """See ``Method``: ``A[j] += sum_i c_i g_i[j]``, c_i the client's share of the examples."""
        total = sum(self.work.sizes[client] for client in replies)
        for client, reply in replies.items():
            for j, scalar in reply.content:
                self.accumulated[j] += scalar * self.work.sizes[client] / total
        self._pull(self.accumulated)

    def state(self) -> Any:
        """See ``Method``: the accumulated scalars are all there is."""
        return self.accumulated.tolist()

    def restore(self, state: Any) -> None:
        """See ``Method``."""
        self.accumulated = np.array(state)
        self._pull(self.accumulated)

    def _pull(self, accumulated: np.ndarray) -> None:
        """Brings the replica to ``w_0 - lr * sum_j accumulated[j] z(seed_j)``."""
        change = accumulated - self._applied
        moved = np.flatnonzero(change)
        self.weights.add(
            [self.pool[j] for j in moved], [-self.lr * float(change[j]) for j in moved]
        )
        self._applied = accumulated.copy()
