"""What a round of many clients costs the server: no model, no network, only bytes.

    python -m pytest benchmarks/bench_server.py --benchmark-only

``ZORBA_BENCH_CLIENTS`` is the number of clients, 100,000 by default. All have masks of their own
over 32 blocks, so that every block has a column of its own and no two plans are alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zorba import machine
from zorba.federated import FederationSettings, Hello, ModelIdentity, Reply, Server, decode
from zorba.federated.aggregate import aggregate
from zorba.federated.settings import AGGREGATIONS
from zorba.identity import package_version

CLIENTS = int(os.environ.get("ZORBA_BENCH_CLIENTS", "100000"))
BLOCKS, SAMPLES = 32, 5
MISSED = 1000
IDENTITY = ModelIdentity(1 << 60, 1 << 61, 1 << 62, 134_515_008, BLOCKS)
GROUP = f"{CLIENTS:,} clients, P = {SAMPLES}, {BLOCKS} blocks"


class Crowd:
    """A server, and what its clients would send."""

    def __init__(self, path: Path, clients: int = CLIENTS, **settings: Any) -> None:
        self.numbers = np.random.default_rng(0)
        self.settings = FederationSettings(
            "bench", 1, 0.01, num_perturbations=SAMPLES, weighting="uniform", **settings
        )
        self.names = [f"client-{n:07d}" for n in range(clients)]
        masks = self.numbers.random((clients, BLOCKS)) < 0.5
        masks[:, 0] |= ~masks.any(axis=1)
        self.server = Server(self.settings, IDENTITY, self.names, masks, path / "job.log")
        self.greet(self.names)

    def greet(self, names: list[str], after: int = 0) -> None:
        # Nobody knows what replicas would tell, so any number does for their fingerprint.
        fixed = (self.settings.job_id, IDENTITY, "gaussian", "stochastic", after)
        rest = (*fixed, IDENTITY.start + after, package_version())
        self.answer((name, Hello(name, *rest).encode()) for name in names)

    def replies(self, names: list[str]) -> Iterator[tuple[str, bytes]]:
        scalars = self.numbers.normal(size=(len(names), 1, SAMPLES)).astype(np.float32)
        job, after = self.settings.job_id, self.server.round - 1
        for name, measured in zip(names, scalars, strict=True):
            now = IDENTITY.start + after
            yield name, Reply(job, after + 1, name, after, now, measured, 8, 0.5).encode()

    def answer(self, replies: Iterable[tuple[str, bytes]]) -> None:
        for name, data in replies:
            assert self.server.receive(name, data).accepted

    def play(self, rounds: int, names: list[str]) -> None:
        for _ in range(rounds):
            self.server.begin_round(names)
            self.answer(self.replies(names))
            self.server.end_round()


def hold_rounds(ready: Callable[[], None], folder: str, rounds: int) -> None:
    ready()
    crowd = Crowd(Path(folder))
    crowd.play(rounds, crowd.names)


def note(benchmark: Any, **facts: object) -> None:
    benchmark.extra_info.update(machine.describe() | {"clients": CLIENTS} | facts)


@pytest.mark.benchmark(group=f"aggregate: {GROUP}")
@pytest.mark.parametrize("rule", AGGREGATIONS)
@pytest.mark.parametrize("columns", [1, BLOCKS])
def bench_aggregate(benchmark: Any, rule: Any, columns: int) -> None:
    numbers = np.random.default_rng(0)
    scalars = numbers.normal(size=(CLIENTS, 1, SAMPLES)).astype(np.float32)
    masks = numbers.random((CLIENTS, columns)) < 0.5
    arguments = (scalars, masks, numbers.integers(1, 64, CLIENTS), 0.01)
    how = {"aggregation": rule, "clip": 3.0}
    note(benchmark, columns=columns)
    benchmark.pedantic(aggregate, arguments, how, rounds=9, warmup_rounds=1)


@pytest.mark.benchmark(group=f"round: {GROUP}")
@pytest.mark.parametrize("part", ["begin", "decode", "receive", "end"])
def bench_round(benchmark: Any, tmp_path: Path, part: str) -> None:
    """Each part of a round by itself; the parts before it are no part of its time."""
    crowd = Crowd(tmp_path)
    server, replies, facts = crowd.server, [], {}
    if part == "begin":
        crowd.play(1, crowd.names)  # so that a plan has an entry of the log in it

    def setup() -> None:
        if part == "begin":
            return
        plan = server.begin_round()[crowd.names[0]]
        replies[:] = crowd.replies(crowd.names)
        facts.update(plan_bytes=len(plan), reply_bytes=len(replies[0][1]))
        if part == "end":
            facts["log_bytes_before"] = server.log.size
            crowd.answer(replies)

    calls: dict[str, Callable[[], object]] = {
        "begin": server.begin_round,
        "decode": lambda: [decode(data) for _, data in replies],
        "receive": lambda: crowd.answer(replies),
        "end": server.end_round,
    }
    benchmark.pedantic(calls[part], setup=setup, rounds=3)
    if part == "end":
        facts["entry_bytes"] = server.log.size - facts.pop("log_bytes_before")
    note(benchmark, **facts)
    server.close()


@pytest.mark.benchmark(group=f"admit all, and run a round: {GROUP}")
@pytest.mark.parametrize("rounds", [0, 1])
def bench_memory(benchmark: Any, tmp_path: Path, rounds: int) -> None:
    """Look at ``peak_bytes``: the time is mostly that of the clients' own messages."""
    apart = benchmark.pedantic(machine.run_apart, (hold_rounds, str(tmp_path), rounds), rounds=1)
    note(benchmark, peak_bytes=apart.above)


@pytest.mark.benchmark(group=f"draw 1,000 of them, and plan: {GROUP}")
def bench_draw(benchmark: Any, tmp_path: Path) -> None:
    crowd = Crowd(tmp_path, clients_per_round=1000)
    note(benchmark)
    plans = benchmark.pedantic(crowd.server.begin_round, rounds=5, warmup_rounds=1)
    assert len(plans) == min(1000, CLIENTS)
    crowd.server.close()


@pytest.mark.benchmark(group=f"{MISSED} rounds missed, P = {SAMPLES}, {BLOCKS} blocks")
@pytest.mark.parametrize("away", [1, 1000])
def bench_catch_up(benchmark: Any, tmp_path: Path, away: int) -> None:
    """Plans for clients that come back, each after another round when they are many."""
    crowd = Crowd(tmp_path, clients=1000 + BLOCKS)
    stayed, left = crowd.names[:BLOCKS], crowd.names[BLOCKS : BLOCKS + away]
    crowd.play(MISSED + away, stayed)
    for n, name in enumerate(left):
        crowd.greet([name], after=n)
    plans = benchmark.pedantic(crowd.server.begin_round, (left,), rounds=3, warmup_rounds=1)
    sizes = [len(plan) for plan in plans.values()]
    facts = {"largest_plan_bytes": max(sizes), "all_plans_bytes": sum(sizes)}
    note(benchmark, log_bytes=crowd.server.log.size, **facts)
    crowd.server.close()
