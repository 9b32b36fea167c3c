"""Which masks train faster at equal total memory: planned, random, or the same for all.

The demo's federation, over the last eight blocks of SmolLM2-135M. Each client has as many blocks
under a planned as under a random mask; under equal masks all have the mean number. Every kind has
the learning rate of a grid at which it came lowest with a seed that is not compared. The seeds that
are compared draw the random and the equal masks, the noise and the order of batches.

    python -m benchmarks.mask_curves

Runs are kept in the JSON file as they end, and only those that are missing are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from zorba.apps.reviews.settings import CLIENTS, ReviewSettings
from zorba.federated import RoundReport

from benchmarks import experiment
from benchmarks.demo_runs import DemoRuns, Masks, described

COUNTS = (1, 1, 1, 1, 2, 2, 4, 4)
BLOCKS = 8
KINDS = {"planned": "#c8553d", "random": "#3b6fa0", "same for all": "#5b9e6f"}
"""Kinds of masks and their colours."""
GRID = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128)
TUNING_SEED = 0
SEEDS = (1, 2, 3)
EVERY = 6  # rounds between evaluations
STRIDE = 3  # every so-manieth batch of a client is evaluated
LEVELS = (0.62, 0.6, 0.58, 0.56)  # of the loss, whose rounds are printed


def masks_of(kind: str, planned: Masks, seed: int) -> Masks:
    """Returns the masks that a run of a kind starts with, bool [clients, blocks]."""
    clients, blocks = planned.shape
    numbers = np.random.default_rng([seed, clients, blocks])

    def draw(count: int) -> Masks:
        return np.isin(np.arange(blocks), numbers.choice(blocks, count, replace=False))

    if kind == "planned":
        return planned
    counts = planned.sum(axis=1)
    if kind == "random":
        return np.array([draw(int(count)) for count in counts])
    return np.array([draw(int(counts.sum()) // clients)] * clients)


def run(runs: DemoRuns, start: float, kind: str, seed: int, lr: float) -> dict[str, Any]:
    """Returns losses by round, and what else a run saw; ``start`` is the loss before it."""
    rounds = runs.settings.rounds
    masks = masks_of(kind, runs.masks, seed)
    losses = [(0, start)]

    def on_round(report: RoundReport) -> None:
        if report.round % EVERY == 0:
            losses.append((report.round, runs.loss(STRIDE)))
            print(f"  round {report.round}: {losses[-1][1]:.4f}", flush=True)

    falling = lambda number: lr * (1 - (number - 1) / rounds)  # noqa: E731
    result = runs.run(masks, order=seed, on_round=on_round, seed=seed, lr=falling)
    return {
        "kind": kind,
        "seed": seed,
        "lr": lr,
        "losses": losses,
        "accuracy": runs.accuracy(),
        "coverage": masks.sum(axis=0).tolist(),
        "replicas_identical": result.replicas_identical,
    }


def tuned_lr(kind: str, end_of: Callable[[float], float]) -> float:
    """Climbs the grid from its middle and returns the learning rate that ended lowest.

    ``end_of`` makes a run at a learning rate, or looks it up, and returns its last loss.

    Raises:
        RuntimeError: the grid ends before the losses rise again.
    """
    place = len(GRID) // 2
    lower, here = (end_of(GRID[p]) for p in (place - 1, place))
    step = 1 if here < lower else -1
    place = place if here < lower else place - 1
    best = min(here, lower)
    while 0 <= place + step < len(GRID) and (end := end_of(GRID[place + step])) < best:
        place, best = place + step, end
    if place in (0, len(GRID) - 1):
        raise RuntimeError(f"{kind}: the best learning rate, {GRID[place]}, is the grid's last")
    return GRID[place]


def make_missing(settings: ReviewSettings, kept: experiment.Results) -> None:
    """Makes the runs that are not kept: those that tune each kind, then those of its seeds."""

    @cache
    def demo() -> tuple[DemoRuns, float]:
        runs = DemoRuns(settings)
        return runs, runs.loss(STRIDE)

    def made(kind: str, seed: int, lr: float) -> dict[str, Any]:
        name = f"{kind}, seed {seed}, lr {lr:g}"
        return kept.run(name, lambda: run(*demo(), kind, seed, lr))

    def end_of(kind: str, lr: float) -> float:
        return float(made(kind, TUNING_SEED, lr)["losses"][-1][1])

    tuned = {kind: tuned_lr(kind, partial(end_of, kind)) for kind in KINDS}
    for seed in SEEDS:
        for kind in KINDS:
            made(kind, seed, tuned[kind])


def rounds_to(losses: list[tuple[int, float]], target: float) -> float:
    """Returns the round at which a curve first comes to a loss, by linear interpolation; or inf."""
    before, above = losses[0]
    for at, loss in losses[1:]:
        if loss <= target:
            return before + (above - target) / (above - loss) * (at - before)
        before, above = at, loss
    return math.inf


def draw(path: Path, compared: Mapping[str, list[dict[str, Any]]]) -> None:
    """Draws the losses of all runs, and the rounds that each kind takes to any loss."""
    figure, (left, right) = experiment.panels(10.5, 4, 2)
    levels = np.linspace(0.75, 0.53, 89)
    end = max(at for runs in compared.values() for run in runs for at, _ in run["losses"])
    for kind, runs in compared.items():
        color = KINDS[kind]
        for n, one in enumerate(runs):
            left.plot(*zip(*one["losses"], strict=True), color=color, label=None if n else kind)
        rounds = np.array([[rounds_to(one["losses"], v) for v in levels] for one in runs])
        middle = np.median(rounds, axis=0)
        shown = np.isfinite(middle)
        right.plot(levels[shown], middle[shown], color=color, label=kind)
        ends = np.minimum(rounds, end)
        right.fill_between(levels, ends.min(0), ends.max(0), color=color, alpha=0.15, linewidth=0)
    left.set(xlabel="round", title="training loss, mean over clients: a line a seed")
    left.set_ylim(0.52, 0.9)
    right.invert_xaxis()
    right.set(xlabel="loss", title=f"rounds to a loss: median and range ({end}: not reached)")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
    experiment.save(figure, path)


def main() -> None:
    """Makes the runs that are missing, prints the rounds to some losses, and draws them."""
    clients = dict(zip(CLIENTS, COUNTS, strict=True))
    settings = ReviewSettings(
        clients=clients, trainable=BLOCKS, rounds=60, perturbations=2, batch_size=4, longest=16,
        out=Path("runs/masks"),
    )  # fmt: skip
    kept = experiment.Results(Path("benchmarks/results/masks.json"), described(settings))
    make_missing(settings, kept)
    runs = [run for run in kept.part("runs").values() if run["seed"] != TUNING_SEED]
    compared = {kind: [run for run in runs if run["kind"] == kind] for kind in KINDS}
    for kind, some in compared.items():
        accuracies = ", ".join(f"{run['accuracy']:.3f}" for run in some)
        print(f"{kind}, lr {some[0]['lr']:g}, accuracy {accuracies}")
        for level in LEVELS:
            rounds = [rounds_to(run["losses"], level) for run in some]
            print(f"  rounds to {level:g}: {', '.join(f'{r:.1f}' for r in rounds)}")
    draw(Path("docs/images/masks.png"), compared)


if __name__ == "__main__":
    main()
