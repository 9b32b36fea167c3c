"""A federation of a few thousand weights: quadratic losses, so that a run takes milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from zorba.federated import (
    Client,
    FederationResult,
    FederationSettings,
    Greeting,
    LocalTransport,
    LogEntry,
    Plan,
    Replica,
    Reply,
    Server,
    decode,
    model_fingerprint,
    run_federation,
)
from zorba.optim import Evaluate, NoiseTerms, one_by_one

import zorba_kernels as zk

BLOCKS = 4
NAMES = ("ada", "bob", "cleo")
MASKS = [[True, True, False, True], [False, True, True, True], [True, True, False, False]]


def make_replica(
    dtype: torch.dtype = torch.float32,
    distribution: Any = "gaussian",
    rounding: Any = "stochastic",
    frozen: float = 1.0,
) -> Replica:
    """A replica at theta_0: blocks of odd sizes, beside a frozen head of the given value."""
    generator = torch.Generator().manual_seed(0)
    groups = {f"blocks.{b}.weight": b for b in range(BLOCKS)}
    shapes = {name: (97 + 40 * b, 3) for name, b in groups.items()}
    blocks = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    origin = model_fingerprint(blocks | {"head": torch.full((5,), frozen, dtype=dtype)})
    return Replica(zk.ParamTable(blocks, groups=groups), origin, distribution, rounding)


def copy_table(table: zk.ParamTable) -> zk.ParamTable:
    return zk.ParamTable(
        {e.name: e.tensor.clone() for e in table.entries},
        groups={e.name: e.group for e in table.entries},
    )


def loss_of(table: zk.ParamTable, target: float) -> float:
    total = sum(float(((e.tensor.double() - target) ** 2).sum()) for e in table.entries)
    return total / table.numel


def make_objective(replica: Replica, target: float, examples: int) -> Callable[[int, int], Any]:
    """Evaluates on a perturbed copy: the weights are never written."""

    def objective(round_number: int, step: int) -> tuple[Evaluate, int]:
        def evaluate(terms: NoiseTerms) -> float:
            moved, law = copy_table(replica.table), replica.distribution
            if terms.seeds:
                zk.add_noise_(moved, terms.seeds, terms.coefs, law, samples=terms.samples)
            return loss_of(moved, target + 0.01 * round_number + 0.1 * step)

        return one_by_one(evaluate), examples

    return objective


def make_settings(**changes: Any) -> FederationSettings:
    defaults = {"job": "test", "seed": 7, "lr": 0.05, "num_perturbations": 3}
    return FederationSettings(**(defaults | changes))


def make_entry(number: int, blocks: int = BLOCKS, columns: int = 2) -> LogEntry:
    """A round of P = 5 that left the last block alone; an empty one without columns.

    ``columns`` is how many sets of blocks got coefficients of their own.
    """
    rng = np.random.default_rng(number)
    terms = NoiseTerms.none(blocks)
    if columns:
        coefs = rng.normal(size=(columns, 5)).astype(np.float32) * np.float32(0.01)
        rows = coefs[np.arange(blocks) % columns]
        rows[-1] = 0
        seed = int(rng.integers(0, 1 << 63))
        terms = NoiseTerms((seed,) * 5, tuple(range(5)), torch.from_numpy(rows))
    base = 123456789 + number if columns else None
    return LogEntry(number, terms, (1 << 64) - number, base=base, mask_version=0xFFFFFFFF)


def plan_of(data: bytes) -> Plan:
    plan = decode(data)
    assert isinstance(plan, Plan), plan
    return plan


def reply_of(data: bytes) -> Reply:
    reply = decode(data)
    assert isinstance(reply, Reply), reply
    return reply


def fail(client: Client, error: BaseException, from_round: int = 1) -> None:
    inner = client.objective

    def failing(round_number: int, step: int) -> Any:
        if round_number >= from_round:
            raise error
        return inner(round_number, step)

    client.objective = failing


def spy(client: Client) -> list[NoiseTerms]:
    """Returns a list that gets the noises at which the client evaluates."""
    seen: list[NoiseTerms] = []
    inner = client.objective

    def spying(round_number: int, step: int) -> Any:
        evaluate, count = inner(round_number, step)
        return (lambda noises: seen.extend(noises) or evaluate(noises)), count  # type: ignore[func-returns-value]

    client.objective = spying
    return seen


class World:
    """A server with changed settings, and one client with a replica of its own for each name."""

    def __init__(
        self,
        path: Path,
        masks: Any = MASKS,
        names: tuple[str, ...] = NAMES,
        dtype: torch.dtype = torch.float32,
        **changes: Any,
    ) -> None:
        self.path, self.settings = path, make_settings(**changes)
        law = (self.settings.distribution, self.settings.rounding)
        self.replicas = {name: make_replica(dtype, *law) for name in names}
        self.clients = {
            name: Client(name, replica, make_objective(replica, 0.1 * n, 10 + n))
            for n, (name, replica) in enumerate(self.replicas.items())
        }
        self.identity = self.replicas[names[0]].identity
        self.masks = masks
        self.greeting = Greeting(self.settings.job_id).encode()
        self.server = self.start()
        self.transport = LocalTransport(self.clients)

    def start(self) -> Server:
        return Server(self.settings, self.identity, list(self.clients), self.masks, self.path)

    def restart(self) -> None:
        """A server after a kill: nothing of the old one is left but the log."""
        self.server.close()
        self.server = self.start()

    def run(self, rounds: int, **options: Any) -> FederationResult:
        return run_federation(self.server, self.transport, rounds, **options)

    def greet(self, *names: str) -> None:
        for name in names or self.clients:
            assert self.server.receive(name, self.clients[name].handle(self.greeting)).accepted

    def plan(self, name: str) -> bytes:
        self.greet()
        return self.server.begin_round()[name]

    def answer(self, name: str, data: bytes) -> Any:
        return self.server.receive(name, self.clients[name].handle(data))

    def fingerprints(self) -> set[int]:
        return {replica.fingerprint(fresh=True) for replica in self.replicas.values()}
