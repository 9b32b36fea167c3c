"""An experiment: a table of runs of the demo's federation, kept as JSON and drawn as curves.

Each result is written down when it is there, and only those that are missing are made: an
experiment that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import nn
from zorba import machine
from zorba.apps.reviews import packages
from zorba.apps.reviews.data import Reviews, read_reviews
from zorba.apps.reviews.federation import build
from zorba.apps.reviews.settings import ReviewSettings
from zorba.federated import Client, LocalTransport, Replica, RoundReport, Server, run_federation
from zorba.files import write_whole

SHARED: dict[str, Any] = {
    "directions": "shared", "perturbations": 5, "distribution": "rademacher", "lr": 1.6e-2,
    "clip": 3.0, "batch_size": 8, "pool": 96,
}  # fmt: skip
"""Settings of the demo with shared directions, by which clients and masks are compared."""

Masks = npt.NDArray[np.bool_]  # [clients, blocks]
Run = dict[str, Any]  # what a run found, as it stands in the JSON file


class Results:
    """A JSON file, ``data``, that is written anew with each result; all runs share ``settings``."""

    def __init__(self, path: Path, settings: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        common = json.loads(json.dumps(settings))
        if settings is not None and self.data.setdefault("settings", common) != common:
            raise SystemExit(f"{path} has runs with other settings: move it away")

    def part(self, name: str) -> dict[str, Any]:
        return self.data.setdefault(name, {})

    def put(self, part: str, value: Mapping[str, Any]) -> None:
        self.part(part).update(finite(value))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(self.data, indent=1, allow_nan=False) + "\n")

    def run(self, name: str, make: Callable[[], Run]) -> Run:
        """Returns a run, made and written down where it is missing."""
        if name not in self.part("runs"):
            print(name, flush=True)
            self.data["machine"] = machine.describe()
            self.put("runs", {name: make()})
        return self.part("runs")[name]


def finite(value: Any) -> Any:
    """Returns results with None for what is no finite number, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- Runs ----------------------------------------------------------------------------------------


class DemoRuns:
    """Model, data and frozen prefixes of ``zorba demo``, for runs that differ in other things.

    ``change`` may replace the text, for example what is held out.
    """

    def __init__(
        self, settings: ReviewSettings, change: Callable[[Reviews], Reviews] = lambda text: text
    ) -> None:
        self.settings = settings
        model, tokenizer = packages.load_model(settings.cache)
        self.federation = build(settings, model, change(read_reviews(settings, tokenizer)))
        self.masks: Masks = np.array(self.federation.plan.mask, dtype=bool)  # the plan's
        self._start = {
            key: [entry.tensor.clone() for entry in replica.table.entries]
            for key, replica in self.federation.replicas.items()
        }

    def run(
        self,
        masks: Masks,  # which trainable blocks each client activates
        lr: float,  # of the first round; it falls linearly to 0
        measure: Callable[[], float],  # of the shared replica's weights
        every: int,  # rounds between two points of the curve
        *,
        seed: int | None = None,  # of the noise and the order of batches; the demo's by default
        wrap: Callable[[str, Client], Client] = lambda name, client: client,
        **changes: Any,  # fields of ``FederationSettings`` that differ from the demo's
    ) -> Run:
        """Runs a federation from the original weights; ``wrap`` may replace an honest client."""
        made, rounds = self.federation, self.settings.rounds
        replicas = {key: self._restored(key) for key in made.replicas}
        clients = {}
        for n, (name, pool) in enumerate(made.pools.items()):
            order = pool.seed if seed is None else seed * 1000 + n
            own = replace(pool, first=int(masks[n].argmax()), seed=order)
            replica = replicas.get(name, replicas["shared"])
            by_row = made.clients[name].by_row
            clients[name] = wrap(name, Client(name, replica, own.objective, by_row=by_row))
        if seed is not None:
            changes["seed"] = seed
        falling = lambda at: lr * (1 - (at - 1) / rounds)  # noqa: E731
        settings = replace(made.settings, lr=falling, **changes)
        curve = [(0, measure())]

        def on_round(report: RoundReport) -> None:
            if report.round % every == 0:
                curve.append((report.round, measure()))
                print(f"  round {report.round}: {curve[-1][1]:.4f}", flush=True)

        with tempfile.TemporaryDirectory() as folder:
            log, identity = Path(folder) / "job.log", replicas["shared"].identity
            server = Server(settings, identity, list(clients), masks, log)
            result = run_federation(server, LocalTransport(clients), rounds, on_round=on_round)
            server.close()
        return {
            "lr": lr,
            "curve": curve,
            "accuracy": self.accuracy(),
            "replicas_identical": result.replicas_identical,
        }

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
    def held_out_loss(self) -> float:
        """Mean loss of the held-out set, at the shared replica's weights."""
        suffix, held_out = self.federation.suffixes["shared"], self.federation.held_out
        logits = torch.cat([suffix.logits(prefix) for prefix in held_out])
        labels = torch.cat([prefix.labels for prefix in held_out])
        return float(nn.functional.cross_entropy(logits, labels))

    @torch.no_grad()
    def _restored(self, key: str) -> Replica:
        """Returns a replica of the original weights that belongs to no job yet."""
        made = self.federation.replicas[key]
        for entry, tensor in zip(made.table.entries, self._start[key], strict=True):
            entry.tensor.copy_(tensor)
        return Replica(made.table, made.identity.origin, self.settings.distribution)


def kept_runs(
    path: Path, settings: ReviewSettings, table: Mapping[str, Callable[[DemoRuns], Run]]
) -> dict[str, Run]:
    """Makes those runs of a table that the file lacks; returns all of them by name."""
    common = {k: v for k, v in asdict(settings).items() if k not in ("out", "cache")}
    results, demo = Results(path, common), cache(lambda: DemoRuns(settings))

    def run(name: str) -> Run:
        return results.run(name, lambda: table[name](demo()))

    return {name: run(name) for name in table}


# --- Pictures ------------------------------------------------------------------------------------


@contextmanager
def picture(
    path: Path, width: float, height: float, columns: int = 1, **options: Any
) -> Iterator[list[Any]]:
    """Gives the axes of a picture of inches by inches, from left to right, and writes it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False, **options)[0]
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    yield list(panels)
    for axes in panels:
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
