"""The loop: the same rounds, counters and evaluations for every method."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from zorba.apps.reviews.task import Score

from benchmarks.peers.method import Method


@dataclass
class Record:
    """What a run saw."""

    # Of each round: mean loss of the clients, seconds of a client (mean), and bytes up and down of
    # a client (mean), the numbers alone and as encoded (see ``Message``).
    rounds: list[dict[str, float]] = field(default_factory=list)
    # After which round, of how many sentences, accuracy and AUC.
    scores: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """How the loop scores the global model."""

    score: Callable[[Any], Score]  # of some batches
    subset: Any  # batches that every point of the curve is taken on
    whole: Any  # batches of the whole set, for the end
    every: int  # rounds between points

    def add(self, record: Record, ends: bool) -> None:
        """Adds the scores of the model as it is now."""
        for batches in (self.subset, self.whole if ends else []):
            if batches:
                score = self.score(batches)
                at = {"round": len(record.rounds), "sentences": sum(len(b.labels) for b in batches)}
                record.scores.append(at | {"accuracy": score.accuracy, "auc": score.auc})


def run_round(method: Method, round_: int, clients: list[str]) -> dict[str, float]:
    """Runs a round and returns what it cost; see ``Record.rounds``."""
    down = method.begin(round_, clients)
    up, seconds = {}, 0.0
    for client, message in down.items():
        started = time.perf_counter()
        up[client] = method.local(client, round_, message)
        seconds += time.perf_counter() - started
    method.aggregate(round_, up)
    count = len(down)
    cost = {"loss": sum(m.loss for m in up.values()) / count, "seconds": seconds / count}
    for way, messages in (("down", down), ("up", up)):
        cost[way] = sum(m.numbers for m in messages.values()) / count
        cost[f"{way}_encoded"] = sum(m.encoded for m in messages.values()) / count
    return cost


def run(
    method: Method,
    clients: list[str],
    rounds: int,
    evaluation: Evaluation,
    on_round: Callable[[Record], None] = lambda record: None,
) -> Record:
    """Runs rounds with all clients; ``on_round`` gets the record after each, and before them."""
    record = Record()
    evaluation.add(record, ends=False)
    on_round(record)
    for round_ in range(1, rounds + 1):
        record.rounds.append(run_round(method, round_, clients))
        if round_ % evaluation.every == 0 or round_ == rounds:
            evaluation.add(record, ends=round_ == rounds)
        on_round(record)
    return record
