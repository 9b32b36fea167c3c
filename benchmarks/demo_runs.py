"""The demo's federation in many runs: built once, each run starts from its weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from zorba.apps.reviews import packages
from zorba.apps.reviews.data import read_reviews
from zorba.apps.reviews.federation import build
from zorba.apps.reviews.settings import ReviewSettings
from zorba.federated import (
    Client,
    FederationResult,
    LocalTransport,
    Replica,
    RoundReport,
    Server,
    run_federation,
)

Masks = npt.NDArray[np.bool_]


def described(settings: ReviewSettings) -> dict[str, Any]:
    """Returns the settings that runs have in common, without folders, for a results file."""
    return {k: v for k, v in asdict(settings).items() if k not in ("out", "cache")}


class DemoRuns:
    """Model, data and frozen prefixes of ``zorba demo``, for runs that differ in other things.

    Attributes:
        masks: the plan's, bool [clients, blocks].
        start_accuracy: of the held-out set, at the original weights.
    """

    def __init__(self, settings: ReviewSettings) -> None:
        self.settings = settings
        model, tokenizer = packages.load_model(settings.cache)
        made = build(settings, model, read_reviews(settings, tokenizer))
        self.federation = made
        self.masks: Masks = np.array(made.plan.mask, dtype=bool)
        self._start = {
            key: [entry.tensor.clone() for entry in replica.table.entries]
            for key, replica in made.replicas.items()
        }
        self.start_accuracy = self.accuracy()

    def run(
        self,
        masks: Masks,
        *,
        order: int | None = None,
        wrap: Callable[[str, Client], Client] = lambda name, client: client,
        on_round: Callable[[RoundReport], None] | None = None,
        **changes: Any,
    ) -> FederationResult:
        """Runs a federation from the original weights; the replicas then hold its weights.

        Args:
            masks: bool [clients, blocks], which trainable blocks each client activates.
            order: seed of the order of batches; the demo's by default.
            wrap: makes the client that takes part of a name and the honest one.
            on_round: called after each round.
            changes: fields of ``FederationSettings`` that differ from the demo's.
        """
        made = self.federation
        replicas = {key: self._restored(key) for key in made.replicas}
        clients = {}
        for n, (name, pool) in enumerate(made.pools.items()):
            seed = pool.seed if order is None else order * 1000 + n
            own = replace(pool, first=int(masks[n].argmax()), seed=seed)
            replica = replicas.get(name, replicas["shared"])
            clients[name] = wrap(name, Client(name, replica, own.objective))
        settings, identity = replace(made.settings, **changes), replicas["shared"].identity
        with tempfile.TemporaryDirectory() as folder:
            server = Server(settings, identity, list(clients), masks, Path(folder) / "job.log")
            transport, rounds = LocalTransport(clients), self.settings.rounds
            result = run_federation(server, transport, rounds, on_round=on_round)
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

    @torch.no_grad()
    def _restored(self, key: str) -> Replica:
        """Returns a replica of the original weights that belongs to no job yet."""
        made = self.federation.replicas[key]
        for entry, tensor in zip(made.table.entries, self._start[key], strict=True):
            entry.tensor.copy_(tensor)
        return Replica(made.table, made.identity.origin, self.settings.distribution)
