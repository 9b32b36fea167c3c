"""The demo's federation in many runs: built once, each run starts from its weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from zorba.apps.reviews import data, federation, packages
from zorba.apps.reviews.settings import ReviewSettings
from zorba.apps.reviews.task import Pool
from zorba.federated import (
    Client,
    FederationResult,
    LocalTransport,
    Replica,
    RoundReport,
    Server,
    run_federation,
)
from zorba.hf import find_blocks

Masks = npt.NDArray[np.bool_]


def described(settings: ReviewSettings) -> dict[str, Any]:
    """Returns the settings that runs have in common, without folders, for a results file."""
    return {k: v for k, v in asdict(settings).items() if k not in ("out", "cache")}


class DemoRuns:
    """Model, data and frozen prefixes of ``zorba demo``, for runs that differ in other things.

    Args:
        settings: of the demo; its plan gives each client as many blocks as ``clients`` says.

    Attributes:
        federation: as the demo has it.
        memory: of a client, as the plan was made with.
        budgets: bytes of each client, as the plan was made with.
    """

    def __init__(self, settings: ReviewSettings) -> None:
        self.settings = settings
        model, tokenizer = packages.load_model(settings.cache)
        parts, evaluation = federation.read_data(settings, tokenizer)
        answers = data.answer_ids(tokenizer)
        trained = find_blocks(model)[-settings.trainable :]
        self.memory, self.budgets = federation.room_for_blocks(model, trained, settings.clients)
        ticks = _ticks(len(evaluation) + len(parts) * settings.pool // settings.batch_size)
        self.federation = federation.build(
            settings, model, parts, evaluation, answers, lambda: next(ticks)
        )
        self._start = {
            key: [entry.tensor.clone() for entry in replica.table.entries]
            for key, replica in self.federation.replicas.items()
        }

    @property
    def masks(self) -> Masks:
        """The plan's, bool [clients, blocks]."""
        return np.array(self.federation.plan.mask, dtype=bool)

    def run(
        self,
        masks: Masks,
        *,
        order: int | None = None,
        wrap: Callable[[str, Client], Client] = lambda name, client: client,
        on_round: Callable[[RoundReport], None] | None = None,
        **changes: Any,
    ) -> FederationResult:
        """Runs a federation from the original weights.

        Args:
            masks: bool [clients, blocks], which trainable blocks each client activates.
            order: seed of the order of batches; the demo's by default.
            wrap: makes the client that takes part of a name and the honest one.
            on_round: called after each round.
            changes: fields of ``FederationSettings`` that differ from the demo's.

        Returns:
            What the run came to; the replicas hold its weights.
        """
        made = self.federation
        for key, replica in made.replicas.items():
            _restore(replica, self._start[key])
        origin, law = made.replicas["shared"].identity.origin, self.settings.distribution
        replicas = {key: Replica(r.table, origin, law) for key, r in made.replicas.items()}
        clients = {}
        for n, (name, replica) in enumerate(self._places(replicas)):
            objective = self._pool(name, masks[n], n, order).objective
            clients[name] = wrap(name, Client(name, replica, objective))
        settings = replace(made.settings, **changes)
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "job.log"
            server = Server(settings, replicas["shared"].identity, list(clients), masks, log)
            result = run_federation(
                server,
                LocalTransport(clients),
                self.settings.rounds,
                on_round=on_round,
            )
            server.close()
        return result

    def accuracy(self) -> float:
        """Of the held-out set, at the shared replica's weights."""
        return self.federation.score().accuracy

    @torch.no_grad()
    def loss(self, every: int) -> float:
        """Mean loss of every so-manieth batch of each client, at the shared replica's weights.

        An estimate of the objective that the federation minimizes, clients weighing the same.
        """
        suffix = self.federation.suffixes["shared"]
        losses = [
            nn.functional.cross_entropy(suffix.logits(prefix), prefix.labels)
            for pool in self.federation.pools.values()
            for prefix in pool.prefixes[::every]
        ]
        return float(torch.stack(losses).mean())

    def _places(self, replicas: Mapping[str, Replica]) -> Iterator[tuple[str, Replica]]:
        for name in self.federation.clients:
            yield name, replicas.get(name, replicas["shared"])

    def _pool(self, name: str, mask: npt.NDArray[np.bool_], n: int, order: int | None) -> Pool:
        """Returns a client's batches under a mask, in an order."""
        made = self.federation.pools[name]
        seed = made.seed if order is None else order * 1000 + n
        return Pool(made.suffix, made.prefixes, list(mask), made.local_steps, seed)


def _restore(replica: Replica, tensors: list[Tensor]) -> None:
    with torch.no_grad():
        for entry, tensor in zip(replica.table.entries, tensors, strict=True):
            entry.tensor.copy_(tensor)


def _ticks(total: int) -> Iterator[None]:
    for n in range(total):
        if n % 20 == 0:
            print(f"frozen prefix: {n} of {total} batches", flush=True)
        yield
