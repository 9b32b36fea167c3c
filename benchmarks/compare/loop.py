"""The loop, the same rounds, counters and evaluations for every method; and one client alone.

A client that is measured runs in a process of its own: how much memory it takes, and how long a
round. Everything that any method needs is imported here, so that all have the same baseline.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from zorba.apps.plan.measure import own_memory
from zorba.apps.reviews.federation import Score
from zorba.hf import find_blocks
from zorba.machine import GIVING_BACK, run_apart
from zorba.offload import Offload

from benchmarks.compare.methods import make_method
from benchmarks.compare.settings import PLANS, Settings
from benchmarks.compare.task import AnswerLoss, load_model, measured_work
from benchmarks.peers.method import Method

_IMPORTED = (peft, transformers)


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
        for batches in (self.subset, self.whole if ends else []):
            if batches:
                score = self.score(batches)
                at = {"round": len(record.rounds), "sentences": sum(len(b.labels) for b in batches)}
                record.scores.append(at | {"accuracy": score.accuracy, "auc": score.auc})


def run_round(method: Method, round_: int, clients: list[str]) -> dict[str, float]:
    """Runs a round; returns what it cost, see ``Record.rounds``."""
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


# --- One client alone ---------------------------------------------------------------------------

_ANSWERS = (5, 9)  # any two tokens: memory and time do not depend on which


@dataclass(frozen=True)
class Row:
    """A client that is measured."""

    method: str  # key of PLANS
    client: str = "client"  # whose mask ZorBA's client has; those of other methods are all alike
    options: tuple[tuple[str, Any], ...] = ()  # that differ from the method's

    @property
    def key(self) -> str:
        return " ".join([self.method, self.client, *(name for name, _ in self.options)])


ROWS = (
    *(Row("zorba", name) for name in ("phone-1", "tablet-1", "laptop-1", "laptop-2", "desktop-1")),
    *(Row(name) for name in ("decomfl", "fedkseed", "mezo", "fedavg-lora")),
    Row("fedavg-lora", options=(("checkpointing", True),)),
)


def client(
    ready: Any, row: Row, mask: Sequence[bool], settings: Settings, folder: Path, threads: int
) -> list[float]:
    """Runs some rounds of a server that has only this client; returns the seconds of each."""
    torch.set_num_threads(threads)
    ready()
    model = load_model(folder)
    with tempfile.TemporaryDirectory(dir=settings.out) as scratch:
        here = Path(scratch)
        if row.method == "zorba":  # its idle blocks stream from files
            blocks = zip(find_blocks(model), mask, strict=True)
            Offload(model, [block.name for block, on in blocks if on], folder=here / "idle")
        else:
            own_memory(model, "cpu")
        work = measured_work(AnswerLoss(model, _ANSWERS), row.client, settings.measured_shape)
        own = replace(settings, out=here)
        method = make_method(row.method, work, own, {row.client: mask}, **dict(row.options))
        rounds = range(1, settings.measured_rounds + 1)
        return [run_round(method, r, [row.client])["seconds"] for r in rounds]


def measure(row: Row, mask: Sequence[bool], settings: Settings, folder: Path) -> dict[str, Any]:
    """Measures a client with the model in ``folder``; its bytes are of anonymous memory."""
    settings.out.mkdir(parents=True, exist_ok=True)
    arguments = (row, mask, settings, folder, torch.get_num_threads())
    seen = run_apart(client, *arguments, environment=GIVING_BACK)
    return {
        "method": row.method,
        "client": row.client,
        "options": dict(row.options),
        "local_steps": PLANS[row.method].local_steps,
        "active_blocks": sum(mask),
        "blocks": len(mask),
        "seconds": seen.result,
        "peak_bytes": seen.above,
        "baseline_bytes": seen.baseline,
        # The first round also finds out how the model uses its weights.
        "seconds_round": statistics.median(seen.result[1:] or seen.result),
    }
