"""Which masks train faster at equal total memory: planned, random, or the same for all.

The demo's federation, over the last eight blocks of SmolLM2-135M. Each client has as many blocks
under a planned as under a random mask; under equal masks all have the mean number. Every kind has
the learning rate of a grid at which it came lowest with a seed that is not compared. The seeds that
are compared draw the random and the equal masks, the noise and the order of batches.

    python -m benchmarks.mask_curves [--draw]

Runs are kept in the JSON file as they end, and only those that are missing are made.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from zorba.apps.reviews.settings import CLIENTS, ReviewSettings

from benchmarks.demo_runs import DemoRuns, Masks, described
from benchmarks.kept_runs import KeptRuns

COUNTS = (1, 1, 1, 1, 2, 2, 4, 4)
BLOCKS = 8
KINDS = {
    "planned": "#c8553d",
    "random": "#3b6fa0",
    "same for all": "#5b9e6f",
}
"""Kinds of masks and their colours."""
GRID = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128)
TUNING_SEED = 0
SEEDS = (1, 2, 3)
EVERY = 6  # rounds between evaluations
_STRIDE = 3  # every so-manieth batch of a client is evaluated
LEVELS = (0.62, 0.6, 0.58, 0.56)  # of the loss, whose rounds are printed


def masks_of(kind: str, planned: Masks, seed: int) -> Masks:
    """Returns the masks that a run of a kind starts with, bool [clients, blocks]."""
    clients, blocks = planned.shape
    numbers = np.random.default_rng([seed, clients, blocks])
    if kind == "planned":
        return planned
    counts = planned.sum(axis=1)
    if kind == "random":
        return np.array([_draw(numbers, blocks, int(count)) for count in counts])
    share, rest = divmod(int(counts.sum()), clients)
    if rest:
        raise ValueError(f"{counts.sum()} active blocks are not the same number for {clients}")
    return np.array([_draw(numbers, blocks, share)] * clients)


def _draw(numbers: np.random.Generator, blocks: int, count: int) -> Masks:
    mask = np.zeros(blocks, dtype=bool)
    mask[numbers.choice(blocks, count, replace=False)] = True
    return mask


class Experiment:
    """Runs of all kinds over one federation."""

    def __init__(self, settings: ReviewSettings) -> None:
        self.runs = DemoRuns(settings)
        self.settings = settings
        self.start = self.runs.loss(_STRIDE)

    def run(self, kind: str, seed: int, lr: float) -> dict[str, Any]:
        """Returns losses by round, and what else the run saw."""
        rounds = self.settings.rounds
        masks = masks_of(kind, self.runs.masks, seed)
        losses = [(0, self.start)]

        def on_round(report: Any) -> None:
            if report.round % EVERY == 0:
                losses.append((report.round, self.runs.loss(_STRIDE)))
                print(f"  round {report.round}: {losses[-1][1]:.4f}", flush=True)

        result = self.runs.run(
            masks,
            order=seed,
            on_round=on_round,
            seed=seed,
            lr=lambda round_number: lr * (1 - (round_number - 1) / rounds),
        )
        return {
            "kind": kind,
            "seed": seed,
            "lr": lr,
            "losses": losses,
            "accuracy": self.runs.accuracy(),
            "coverage": masks.sum(axis=0).tolist(),
            "replicas_identical": result.replicas_identical,
        }


def tuned_lr(kind: str, end_of: Callable[[float], float]) -> float:
    """Climbs the grid from its middle and returns the learning rate that ended lowest.

    Args:
        kind: of masks.
        end_of: makes a run at a learning rate, or looks it up, and returns its last loss.

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


def curves_of(runs: Mapping[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns the runs that are compared: those of the seeds, at each kind's learning rate."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for run in runs.values():
        if run["seed"] != TUNING_SEED and run["kind"] in KINDS:
            curves.setdefault(run["kind"], []).append(run)
    return curves


def rounds_to(losses: list[tuple[int, float]], target: float) -> float:
    """Returns the round at which a curve first comes to a loss, by linear interpolation; or inf."""
    before, above = losses[0]
    for at, loss in losses[1:]:
        if loss <= target:
            return before + (above - target) / (above - loss) * (at - before)
        before, above = at, loss
    return math.inf


def draw(path: Path, curves: Mapping[str, list[dict[str, Any]]]) -> None:
    """Draws the losses of all runs, and the rounds that each kind takes to any loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    levels = np.linspace(0.75, 0.53, 89)
    end = max(at for runs in curves.values() for run in runs for at, _ in run["losses"])
    for kind in (kind for kind in KINDS if kind in curves):
        color = KINDS[kind]
        for n, run in enumerate(curves[kind]):
            left.plot(*zip(*run["losses"], strict=True), color=color, label=None if n else kind)
        rounds = np.array([[rounds_to(r["losses"], v) for v in levels] for r in curves[kind]])
        middle = np.median(rounds, axis=0)
        shown = np.isfinite(middle)
        right.plot(levels[shown], middle[shown], color=color, label=kind)
        ends = np.minimum(rounds, end)
        right.fill_between(levels, ends.min(0), ends.max(0), color=color, alpha=0.15, linewidth=0)
    left.set(xlabel="round", title="training loss, mean over clients: a line a seed")
    left.set_ylim(0.52, 0.9)
    left.legend(frameon=False, fontsize=8)
    right.invert_xaxis()
    right.set(xlabel="loss", title=f"rounds to a loss: median and range ({end}: not reached)")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Makes the runs that are missing, prints the rounds to some losses, and draws them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--draw", action="store_true", help="only draw what is in the JSON file")
    parser.add_argument("--out", type=Path, default=Path("docs/images/masks.png"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/masks.json"))
    arguments = parser.parse_args()
    settings = ReviewSettings(
        clients=dict(zip(CLIENTS, COUNTS, strict=True)),
        trainable=BLOCKS,
        rounds=60,
        perturbations=2,
        batch_size=4,
        longest=16,
        out=Path("runs/masks"),
    )
    kept = KeptRuns(arguments.json, described(settings))
    if not arguments.draw:
        _make_missing(cache(lambda: Experiment(settings)), kept)
    curves = curves_of(kept.runs)
    for kind, some in curves.items():
        print(f"{kind}, lr {some[0]['lr']:g}, accuracy {_each(some, 'accuracy')}")
        for level in LEVELS:
            rounds = [rounds_to(run["losses"], level) for run in some]
            print(f"  rounds to {level:g}: {', '.join(f'{r:.1f}' for r in rounds)}")
    draw(arguments.out, curves)


def _each(runs: list[dict[str, Any]], what: str) -> str:
    return ", ".join(f"{run[what]:.3f}" for run in runs)


def _make_missing(experiment: Callable[[], Experiment], kept: KeptRuns) -> None:
    def made(kind: str, seed: int, lr: float) -> dict[str, Any]:
        name = f"{kind}, seed {seed}, lr {lr:g}"
        return kept.get(name, lambda: experiment().run(kind, seed, lr))

    def end_of(kind: str, lr: float) -> float:
        return float(made(kind, TUNING_SEED, lr)["losses"][-1][1])

    tuned = {kind: tuned_lr(kind, partial(end_of, kind)) for kind in KINDS}
    for seed in SEEDS:
        for kind in KINDS:
            made(kind, seed, tuned[kind])


if __name__ == "__main__":
    main()
