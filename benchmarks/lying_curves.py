"""Two clients of eight lie: what mean and trimmed mean make of the demo's federation.

Every client has room for all four trainable blocks, so that each block has eight clients; the two
that lie are drawn by the seed. All else is as in ``zorba demo``: model, data, split, noise.

    python -m benchmarks.lying_curves

Runs are kept in the JSON file as they end, and only those that are missing are made.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from zorba.apps.reviews.settings import CLIENTS, ReviewSettings
from zorba.federated import Client, RoundReport

from benchmarks import experiment
from benchmarks.demo_runs import DemoRuns, described
from benchmarks.lying_clients import LIES, LyingClient

BLOCKS = 4


@dataclass(frozen=True)
class Case:
    """A run: what two clients send, and what the server does about it."""

    lie: str | None
    aggregation: str
    clip: float | None
    lr: float = 1.6e-2  # of the first round


_CAREFUL = 4e-3  # without a clip the demo's rate does not converge, even where nobody lies
CASES = {
    "nobody lies, mean": Case(None, "mean", 3.0),
    "garbage, trimmed": Case("garbage", "trimmed", 3.0),
    "garbage, mean": Case("garbage", "mean", 3.0),
    "nobody lies, mean, no clip": Case(None, "mean", None, _CAREFUL),
    "garbage, mean, no clip": Case("garbage", "mean", None, _CAREFUL),
    "garbage, trimmed, no clip": Case("garbage", "trimmed", None, _CAREFUL),
    "opposite, trimmed": Case("opposite", "trimmed", 3.0),
    "opposite, mean": Case("opposite", "mean", 3.0),
}
EVALUATIONS = 8
COLORS = {"mean": "#d62728", "trimmed": "#1f77b4"}
PANELS = {
    ("garbage", None): "Two of eight send random bits, no clip",
    ("garbage", 3.0): "Two of eight send random bits, clip at 3",
    ("opposite", 3.0): "Two of eight send theirs times -10, clip at 3",
}


def run_case(runs: DemoRuns, case: Case) -> dict[str, Any]:
    """Returns losses, and accuracy by round."""
    settings = runs.settings
    every = max(1, settings.rounds // EVALUATIONS)
    numbers = np.random.default_rng(settings.seed)
    liars = sorted(numbers.choice(list(settings.clients), 2, replace=False).tolist())
    reports: list[RoundReport] = []
    scores: list[tuple[int, float]] = []

    def wrap(name: str, client: Client) -> Client:
        if case.lie is None or name not in liars:
            return client
        return LyingClient(client, LIES[case.lie], liars.index(name))

    def on_round(report: RoundReport) -> None:
        reports.append(report)
        if report.round % every == 0 or report.round == settings.rounds:
            scores.append((report.round, runs.accuracy()))
            print(f"  round {report.round}: {scores[-1][1]:.3f}", flush=True)

    result = runs.run(
        np.ones_like(runs.masks), wrap=wrap, on_round=on_round, trim=0.25, clip=case.clip,
        aggregation=case.aggregation, lr=lambda at: case.lr * (1 - (at - 1) / settings.rounds),
    )  # fmt: skip
    return {
        "case": asdict(case),
        "liars": liars if case.lie else [],
        "scores": [(0, runs.start_accuracy), *scores],
        "losses": [report.loss for report in reports],
        "rounds_with_problems": sum(bool(r.problem or r.failures) for r in reports),
        "replicas_identical": result.replicas_identical,
    }


def draw(path: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Draws accuracy over rounds, a panel for each lie and clip."""
    figure, panels = experiment.panels(12, 3.6, len(PANELS), sharey=True)
    for axes, ((lie, clip), title) in zip(panels, PANELS.items(), strict=True):
        for run in runs.values():
            case = Case(**run["case"])
            if case.clip == clip and case.lie in (None, lie):
                style = {"color": COLORS[case.aggregation], "label": case.aggregation}
                if case.lie is None:
                    style = {"color": "#555555", "label": "nobody lies, mean", "linestyle": "--"}
                axes.plot(*zip(*run["scores"], strict=True), linewidth=1.8, **style)
        axes.set_xlabel("round")
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set(ylabel="accuracy, SST-2 validation")
    experiment.save(figure, path)


def main() -> None:
    """Makes the runs that are missing, prints their accuracies and draws them."""
    clients = dict.fromkeys(CLIENTS, BLOCKS)
    settings = ReviewSettings(clients=clients, rounds=40, out=Path("runs/lying"))
    kept = experiment.Results(Path("benchmarks/results/lying.json"), described(settings))
    runs = cache(lambda: DemoRuns(settings))
    for name, case in CASES.items():
        kept.run(name, lambda case=case: run_case(runs(), case))  # type: ignore[misc]
    for name, run in kept.part("runs").items():
        (_, first), (_, last) = run["scores"][0], run["scores"][-1]
        print(f"{name:28} accuracy {first:.3f} before, {last:.3f} after")
    draw(Path("docs/images/lying.png"), kept.part("runs"))


if __name__ == "__main__":
    main()
