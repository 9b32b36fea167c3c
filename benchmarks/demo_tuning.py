"""Which learning rate and clip ``zorba demo`` takes: chosen by sentences that nobody else sees.

The demo's federation with another seed, scored on 800 sentences of Rotten Tomatoes that no client
trains on. SST-2, which the demo is evaluated on, is not read.

    python -m benchmarks.demo_tuning
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from zorba.apps.reviews.data import Reviews, balanced_batches, batches_by_length
from zorba.apps.reviews.settings import ReviewSettings

from benchmarks.experiment import DemoRuns, Results, Run

SEED, ROUNDS, HELD_OUT = 11, 250, 800
# Rates and clips.
TRIED = ((2e-3, 3.0), (4e-3, 3.0), (8e-3, 3.0), (1.6e-2, 3.0), (6e-3, 1.0), (4e-3, 10.0))


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
def demo() -> DemoRuns:
    settings = ReviewSettings(seed=SEED, rounds=ROUNDS)
    return DemoRuns(settings, lambda reviews: with_tuning_split(settings, reviews))


def run(lr: float, clip: float) -> Run:
    runs = demo()
    found = runs.run(runs.masks, lr, runs.held_out_loss, ROUNDS // 5, clip=clip)
    return {**found, "clip": clip, "auc": runs.federation.score().auc}


def main() -> None:
    shared = {"seed": SEED, "rounds": ROUNDS, "held out": HELD_OUT}
    results = Results(Path("benchmarks/results/demo_tuning.json"), shared)
    for lr, clip in TRIED:
        name = f"lr {lr:g}, clip {clip:g}"
        found = results.run(name, partial(run, lr, clip))
        loss = found["curve"][-1][1]
        print(f"{name}: loss {loss:.4f}, accuracy {found['accuracy']:.3f}, AUC {found['auc']:.3f}")


if __name__ == "__main__":
    main()
