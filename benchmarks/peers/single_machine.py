"""MeZO on one machine that holds all the data (arXiv 2305.17333), as a federation of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.peers import mezo
from benchmarks.peers.in_place import seed_of
from benchmarks.peers.method import Message, Work, bare


class SingleMachine:
    """MeZO's published step with torch's noise; see ``benchmarks.peers.method.Method``.

    Its client's local work is a step of the global model itself: there is nobody to send to.

    Args:
        work: model and data, of one client.
        lr: learning rate.
        eps: perturbation scale.
        seed: from which the seeds of steps are drawn.
    """

    def __init__(self, work: Work, lr: float, eps: float = 1e-3, seed: int = 0) -> None:
        if len(work.clients) != 1:
            raise ValueError(f"one machine holds all the data, got clients {work.clients}")
        self.work, self.lr, self.eps, self.seed = work, lr, eps, seed
        self._parameters = dict(work.model.named_parameters())

    def begin(self, round_: int, clients: Sequence[str]) -> dict[str, Message]:
        """See ``Method``: nothing is sent."""
        return {client: bare(None, 0) for client in clients}

    def local(self, client: str, round_: int, message: Message) -> Message:
        """See ``Method``: one step, which stays."""
        batch = self.work.batch(client, round_, 0)
        seed = seed_of(self.seed, round_)
        parameters: Any = list(self._parameters.values())
        loss = mezo.step(parameters, lambda: self.work.loss(batch), seed, self.eps, self.lr)
        return bare(None, 0, loss)

    def aggregate(self, round_: int, replies: Mapping[str, Message]) -> None:
        """See ``Method``: there is nothing left to do."""

    def state(self) -> Any:
        """See ``Method``: all weights."""
        return {name: p.data for name, p in self._parameters.items()}

    def restore(self, state: Any) -> None:
        """See ``Method``."""
        with torch.no_grad():
            for name, p in self._parameters.items():
                p.copy_(state[name])
