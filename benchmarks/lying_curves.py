"""Two clients of eight lie: what mean and trimmed mean make of the demo's federation.

Every client has room for all four trainable blocks, so that each block has eight clients; the two
that lie are drawn by the seed. All else is as in ``zorba demo``: model, data, split, noise.

    python -m benchmarks.lying_curves [--rounds 40] [--only NAME ...] [--draw]

Runs are kept in the JSON file as they end, and only those that are missing are made.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from zorba.apps.reviews.settings import CLIENTS, ReviewSettings
from zorba.federated import Client, RoundReport

from benchmarks.demo_runs import DemoRuns, described
from benchmarks.kept_runs import KeptRuns
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


class Experiment:
    """Runs of all cases over one federation."""

    def __init__(self, settings: ReviewSettings) -> None:
        self.settings = settings
        self.runs = DemoRuns(settings)
        assert self.runs.masks.all()
        self.start = self.runs.accuracy()
        numbers = np.random.default_rng(settings.seed)
        self.liars = sorted(numbers.choice(list(settings.clients), 2, replace=False).tolist())

    def run(self, case: Case) -> dict[str, Any]:
        """Returns losses, and accuracy by round."""
        every = max(1, self.settings.rounds // EVALUATIONS)
        scores = {0: self.start}
        losses: list[float] = []
        problems = 0

        def wrap(name: str, client: Client) -> Client:
            if case.lie is None or name not in self.liars:
                return client
            return LyingClient(client, LIES[case.lie], self.liars.index(name))

        def on_round(report: RoundReport) -> None:
            nonlocal problems
            problems += bool(report.problem or report.failures)
            losses.append(report.loss)
            if report.round % every == 0 or report.round == self.settings.rounds:
                scores[report.round] = self.runs.accuracy()
                print(f"  round {report.round}: {scores[report.round]:.3f}", flush=True)

        result = self.runs.run(
            self.runs.masks,
            wrap=wrap,
            on_round=on_round,
            aggregation=case.aggregation,
            clip=case.clip,
            lr=lambda round_: case.lr * (1 - (round_ - 1) / self.settings.rounds),
            trim=0.25,
        )
        return {
            "case": asdict(case),
            "liars": self.liars if case.lie else [],
            "scores": list(scores.items()),
            "losses": losses,
            "rounds_with_problems": problems,
            "replicas_identical": result.replicas_identical,
        }


PANELS = {
    ("garbage", None): "Two of eight send random bits, no clip",
    ("garbage", 3.0): "Two of eight send random bits, clip at 3",
    ("opposite", 3.0): "Two of eight send theirs times -10, clip at 3",
}


def draw(path: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Draws accuracy over rounds, a panel for each lie and clip."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, ((lie, clip), title) in zip(panels, PANELS.items(), strict=True):
        for run in runs.values():
            case = run["case"]
            clean = case["lie"] is None
            if case["clip"] != clip or case["lie"] not in (None, lie):
                continue
            at, accuracy = zip(*run["scores"], strict=True)
            color = "#555555" if clean else COLORS[case["aggregation"]]
            label = "nobody lies, mean" if clean else case["aggregation"]
            style = {"linestyle": "--", "linewidth": 2.5} if clean else {"linewidth": 1.8}
            axes.plot(at, accuracy, color=color, label=label, **style)
        axes.set_xlabel("round")
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False, loc="best", fontsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="accuracy, SST-2 validation")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Makes the runs that are missing, prints their accuracies and draws them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--draw", action="store_true", help="only draw what is in the JSON file")
    parser.add_argument("--out", type=Path, default=Path("docs/images/lying.png"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/lying.json"))
    arguments = parser.parse_args()
    settings = ReviewSettings(
        clients=dict.fromkeys(CLIENTS, BLOCKS), rounds=arguments.rounds, out=Path("runs/lying")
    )
    kept = KeptRuns(arguments.json, described(settings))
    experiment = cache(lambda: Experiment(settings))
    for name in [] if arguments.draw else arguments.only:
        case = CASES[name]
        if name in kept.runs and kept.runs[name]["case"] != asdict(case):
            del kept.runs[name]
        kept.get(name, lambda case=case: experiment().run(case))
    for name, run in kept.runs.items():
        (_, first), (_, last) = run["scores"][0], run["scores"][-1]
        print(f"{name:28} accuracy {first:.3f} before, {last:.3f} after")
    draw(arguments.out, kept.runs)


if __name__ == "__main__":
    main()
