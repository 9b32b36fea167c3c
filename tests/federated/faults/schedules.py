"""One random kill schedule beside the run that nothing disturbs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from tests.federated.faults.kills import draw_schedule
from tests.federated.faults.lives import Job
from tests.federated.faults.run import run
from tests.federated.world import NAMES, make_settings


def one(folder: Path, seed: int, rounds: int) -> tuple[str, list[str]]:
    """Runs one schedule and the undisturbed run beside it.

    Returns:
        What was wrong, empty where nothing was, and the kills that happened, in words.
    """
    rng = random.Random(seed)
    settings = make_settings(
        seed=rng.getrandbits(32),
        local_steps=rng.choice((1, 2)),
        distribution=rng.choice(("gaussian", "rademacher")),
    )
    options: dict[str, Any] = {
        "settings": settings,
        "rounds": rounds,
        "dtype": rng.choice((torch.float32, torch.bfloat16)),
        "checkpoint_every": rng.choice((None, 1, 3, 7)),
    }
    undisturbed = run(Job(folder / "undisturbed", **options))
    schedule = draw_schedule(rng, NAMES, rounds)
    drawn = str(schedule)
    try:
        disturbed = run(Job(folder / "disturbed", **options), schedule)
    except (RuntimeError, TimeoutError) as error:
        return f"{drawn}: {error}", []
    happened = [
        f"{'server' if process == 'server' else 'site'} {point}"
        for process, point in disturbed.kills
    ]
    if not (undisturbed.identical and disturbed.identical):
        return f"{drawn}: replicas differ: {disturbed.fingerprints}", happened
    if disturbed.fingerprints != undisturbed.fingerprints:
        return f"{drawn}: another fingerprint than the undisturbed run's", happened
    if disturbed.log != undisturbed.log:
        return f"{drawn}: another log than the undisturbed run's", happened
    damaged = [note for note in disturbed.notes if "damaged" in note or "error" in note]
    return (f"{drawn}: {damaged}" if damaged else ""), happened
