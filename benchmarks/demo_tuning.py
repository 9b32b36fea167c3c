"""Which learning rate and clip ``zorba demo`` takes: chosen by sentences that nobody else sees.

The demo's federation with other seeds, scored on 800 sentences of Rotten Tomatoes that no client
trains on. SST-2, which the demo is evaluated on, is not read.

    python -m benchmarks.demo_tuning
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from zorba.apps.reviews.data import Reviews, balanced_batches, batches_by_length
from zorba.apps.reviews.settings import ReviewSettings

from benchmarks.experiment import DemoRuns, Results, Run

SEEDS = (11, 12)
HELD_OUT = 800
TRIED = ((2e-3, 3.0), (4e-3, 3.0), (8e-3, 3.0), (1.2e-2, 1.0), (1.6e-2, 3.0))  # rates and clips


def with_tuning_split(settings: ReviewSettings, reviews: Reviews) -> Reviews:
    """Returns the text with sentences that no client trains on in the place of SST-2."""
    rest = []
    for own in reviews.clients.values():
        batches = balanced_batches(own, settings.pool, settings.batch_size)
        used = {example.ids for batch in batches for example in batch}
        rest += [example for example in own if example.ids not in used]
    order = np.random.default_rng(5).permutation(len(rest))
    return replace(reviews, evaluation=batches_by_length([rest[i] for i in order[:HELD_OUT]], 64))


@cache
def demo(seed: int) -> DemoRuns:
    settings = ReviewSettings(seed=seed)
    return DemoRuns(settings, lambda reviews: with_tuning_split(settings, reviews))


def run(seed: int, lr: float, clip: float) -> Run:
    runs = demo(seed)
    every = runs.settings.rounds // 5
    found = runs.run(runs.masks, lr, runs.held_out_loss, every, seed=seed, clip=clip)
    return {**found, "clip": clip, "auc": runs.federation.score().auc}


def main() -> None:
    results = Results(Path("benchmarks/results/demo_tuning.json"), {"held out": HELD_OUT})
    for seed in SEEDS:
        for lr, clip in TRIED:
            name = f"lr {lr:g}, clip {clip:g}, seed {seed}"
            found = results.run(name, lambda seed=seed, lr=lr, clip=clip: run(seed, lr, clip))
            loss = found["curve"][-1][1]
            print(f"{name}: loss {loss:.4f}, accuracy {found['accuracy']:.3f}, {found['auc']:.3f}")


if __name__ == "__main__":
    main()
