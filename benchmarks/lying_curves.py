"""Two clients of eight lie: what mean and trimmed mean make of the demo's federation.

Every client has room for all four trainable blocks, so that each block has eight clients; the two
that lie are drawn by the seed. All else is as in ``zorba demo``: model, data, split, noise.

    python -m benchmarks.lying_curves
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from zorba.apps.reviews.settings import CLIENTS, ReviewSettings
from zorba.federated import Client

from benchmarks.experiment import SHARED, DemoRuns, Run, kept_runs, picture
from benchmarks.lying_clients import LIES, LyingClient

BLOCKS, EVERY = 4, 5  # trainable blocks; rounds between two scores
# Learning rate by clip: without one the demo's does not converge, even where nobody lies.
RATES: dict[float | None, float] = {3.0: 1.6e-2, None: 4e-3}
Case = tuple[str | None, str, float | None]  # a lie, the aggregation and the clip
PANELS = {
    ("garbage", None): "Two of eight send random bits, no clip",
    ("garbage", 3.0): "Two of eight send random bits, clip at 3",
    ("opposite", 3.0): "Two of eight send theirs times -10, clip at 3",
}
COLORS = {"mean": "#d62728", "trimmed": "#1f77b4"}


def run(demo: DemoRuns, case: Case) -> Run:
    """Returns a run in which two clients send a lie; the curve is accuracy by round."""
    lie, aggregation, clip = case
    numbers = np.random.default_rng(demo.settings.seed)
    liars = sorted(numbers.choice(list(demo.settings.clients), 2, replace=False).tolist())

    def wrap(name: str, client: Client) -> Client:
        if lie is None or name not in liars:
            return client
        return LyingClient(client, LIES[lie], liars.index(name))

    return demo.run(
        np.ones_like(demo.masks), RATES[clip], demo.accuracy, EVERY,
        wrap=wrap, aggregation=aggregation, trim=0.25, clip=clip,
    )  # fmt: skip


def cases_of(lie: str, clip: float | None) -> dict[str, Case]:
    cases: list[Case] = [(None, "mean", clip), (lie, "trimmed", clip), (lie, "mean", clip)]
    end = ", no clip" if clip is None else ""
    return {f"{case[0] or 'nobody lies'}, {case[1]}{end}": case for case in cases}


def main() -> None:
    clients = dict.fromkeys(CLIENTS, BLOCKS)
    settings = ReviewSettings(clients=clients, rounds=40, out=Path("runs/lying"), **SHARED)
    cases = [cases_of(*panel) for panel in PANELS]
    table = {name: partial(run, case=case) for some in cases for name, case in some.items()}
    runs = kept_runs(Path("benchmarks/results/lying.json"), settings, table)
    for name, found in runs.items():
        (_, first), *_, (_, last) = found["curve"]
        print(f"{name:28} accuracy {first:.3f} before, {last:.3f} after")
    with picture(Path("docs/images/lying.png"), 12, 3.6, len(PANELS), sharey=True) as panels:
        for axes, title, some in zip(panels, PANELS.values(), cases, strict=True):
            axes.set(xlabel="round", title=title)
            for name, (lie, aggregation, _) in some.items():
                style = {"color": COLORS[aggregation], "label": aggregation}
                if lie is None:
                    style = {"color": "#555555", "label": "nobody lies, mean", "linestyle": "--"}
                axes.plot(*zip(*runs[name]["curve"], strict=True), linewidth=1.8, **style)
        panels[0].set(ylabel="accuracy, SST-2 validation")


if __name__ == "__main__":
    main()
