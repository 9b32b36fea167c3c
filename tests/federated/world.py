"""A federation of a few thousand weights: quadratic losses, so that a run takes milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from zorba.federated import (
    Client,
    FederationSettings,
    LocalTransport,
    LogEntry,
    Replica,
    Server,
    model_fingerprint,
)
from zorba.optim import Evaluate, NoiseTerms, one_by_one

import zorba_kernels as zk

BLOCKS = 4
NAMES = ("ada", "bob", "cleo")
MASKS = [[True, True, False, True], [False, True, True, True], [True, True, False, False]]


def make_model(dtype: torch.dtype = torch.float32, frozen: float = 1.0) -> dict[str, Tensor]:
    """Blocks of odd sizes, and a frozen head of the given value."""
    generator = torch.Generator().manual_seed(0)
    model = {
        f"blocks.{b}.weight": torch.randn(97 + 40 * b, 3, generator=generator).to(dtype)
        for b in range(BLOCKS)
    }
    return model | {"head": torch.full((5,), frozen, dtype=dtype)}


def make_replica(
    dtype: torch.dtype = torch.float32,
    distribution: Any = "gaussian",
    rounding: Any = "stochastic",
    frozen: float = 1.0,
) -> Replica:
    """A replica at theta_0."""
    model = make_model(dtype, frozen)
    groups = {name: int(name.split(".")[1]) for name in model if name != "head"}
    table = zk.ParamTable({name: model[name] for name in groups}, groups=groups)
    return Replica(table, model_fingerprint(model), distribution, rounding)


def copy_table(table: zk.ParamTable) -> zk.ParamTable:
    """The same weights in other memory."""
    return zk.ParamTable(
        {e.name: e.tensor.clone() for e in table.entries},
        groups={e.name: e.group for e in table.entries},
    )


def loss_of(table: zk.ParamTable, target: float) -> float:
    """Mean squared distance of all weights to the target."""
    total = sum(float(((e.tensor.double() - target) ** 2).sum()) for e in table.entries)
    return total / table.numel


def make_objective(replica: Replica, target: float, examples: int) -> Callable[[int, int], Any]:
    """Evaluates on a perturbed copy: the weights are never written."""

    def objective(round_number: int, step: int) -> tuple[Evaluate, int]:
        def evaluate(terms: NoiseTerms) -> float:
            perturbed = copy_table(replica.table)
            if terms.seeds:
                zk.add_noise_(
                    perturbed,
                    terms.seeds,
                    terms.coefs,
                    replica.distribution,
                    samples=terms.samples,
                )
            return loss_of(perturbed, target + 0.01 * round_number + 0.1 * step)

        return one_by_one(evaluate), examples

    return objective


def make_settings(**changes: Any) -> FederationSettings:
    """Settings of a small job."""
    defaults: dict[str, Any] = {"job": "test", "seed": 7, "lr": 0.05, "num_perturbations": 3}
    return FederationSettings(**(defaults | changes))


def make_entry(number: int, blocks: int = BLOCKS, columns: int = 2, steps: int = 1) -> LogEntry:
    """A round of P = 5 that left the last block alone; an empty one without columns.

    Args:
        number: of the round.
        blocks: of the model.
        columns: how many sets of blocks got coefficients of their own.
        steps: local steps, K.
    """
    rng = np.random.default_rng(number)
    terms = NoiseTerms.none(blocks)
    if columns:
        seeds = [int(seed) for seed in rng.integers(0, 1 << 63, steps)]
        coefs = rng.normal(size=(columns, 5 * steps)).astype(np.float32) * np.float32(0.01)
        rows = coefs[np.arange(blocks) % columns]
        rows[-1] = 0
        terms = NoiseTerms(
            tuple(seed for seed in seeds for _ in range(5)),
            tuple(range(5)) * steps,
            torch.from_numpy(rows),
        )
    return LogEntry(
        number,
        terms,
        rounding_seed=(1 << 64) - number,
        base=123456789 + number if columns else None,
        mask_version=0xFFFFFFFF,
    )


def weights_of(replica: Replica) -> list[Tensor]:
    """Copies of all tensors."""
    return [entry.tensor.clone() for entry in replica.table.entries]


class World:
    """A server, and one client with a replica of its own for each name."""

    def __init__(
        self,
        path: Path,
        settings: FederationSettings | None = None,
        dtype: torch.dtype = torch.float32,
        masks: Any = MASKS,
        names: tuple[str, ...] = NAMES,
    ) -> None:
        self.settings = settings or make_settings()
        self.path = path
        law = (self.settings.distribution, self.settings.rounding)
        self.replicas = {name: make_replica(dtype, *law) for name in names}
        self.clients = {
            name: Client(name, replica, make_objective(replica, 0.1 * n, 10 + n))
            for n, (name, replica) in enumerate(self.replicas.items())
        }
        self.identity = self.replicas[names[0]].identity
        self.masks = masks
        self.server = self.start()
        self.transport = LocalTransport(self.clients)

    def start(self) -> Server:
        """A server on the log, which may have rounds already."""
        return Server(self.settings, self.identity, list(self.clients), self.masks, self.path)

    def restart(self) -> None:
        """A server after a kill: nothing of the old one is left but the log."""
        self.server.close()
        self.server = self.start()

    def greet(self) -> None:
        """Admits everyone."""
        for name, message in self.server.greetings().items():
            assert self.server.receive(name, self.clients[name].handle(message)).accepted

    def plan(self, name: str) -> bytes:
        """The client's plan of a round that is begun now."""
        self.greet()
        return self.server.begin_round()[name]

    def fingerprints(self) -> set[int]:
        """Of all replicas, read from the weights."""
        return {replica.fingerprint(fresh=True) for replica in self.replicas.values()}
