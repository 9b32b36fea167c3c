"""The loop: the same rounds, counters and evaluations for every method."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from zorba.apps.reviews.federation import Score
from zorba.files import write_whole

from benchmarks.peers.method import Method


@dataclass
class Record:
    """What a run saw.

    Attributes:
        rounds: of each round: mean loss of the clients, seconds of a client (mean), and bytes up
            and down of a client (mean), ``numbers`` and as ``encoded`` (``Message``).
        scores: after which round, of how many sentences, accuracy and AUC.
    """

    rounds: list[dict[str, float]] = field(default_factory=list)
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
    keep: Path,
    resume: bool = False,
    on_round: Callable[[Record], None] = lambda record: None,
    until: float = float("inf"),
) -> tuple[Record, bool]:
    """Runs a method, from its start or from where it was stopped.

    Args:
        method: on a replica of the original weights.
        clients: that take part, in every round.
        rounds: in all.
        evaluation: how and when the global model is scored.
        keep: file that state and record are kept in, after every round.
        resume: continue from that file, where there is one.
        on_round: called with the record after each round, and after the first evaluation.
        until: ``time.monotonic()`` at which the run stops.

    Returns:
        The record, and whether the run came to its end.
    """
    record = Record()
    keep.parent.mkdir(parents=True, exist_ok=True)
    if resume and keep.exists():
        kept = torch.load(keep, weights_only=False)
        method.restore(kept.pop("state"))
        record = Record(**kept)
    else:
        evaluation.add(record, ends=False)
    on_round(record)
    while len(record.rounds) < rounds:
        round_ = len(record.rounds) + 1
        record.rounds.append(run_round(method, round_, clients))
        if round_ % evaluation.every == 0 or round_ == rounds:
            evaluation.add(record, ends=round_ == rounds)
        on_round(record)
        content = {**asdict(record), "state": method.state()}
        write_whole(keep, lambda part, content=content: torch.save(content, part))  # type: ignore[misc]
        if time.monotonic() >= until:
            break
    return record, len(record.rounds) == rounds
