"""DemoSettings: the knobs of the demo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from zorba_kernels.noise import Distribution

CLIENTS = {
    "phone-1": 1,
    "phone-2": 1,
    "tablet-1": 2,
    "tablet-2": 2,
    "tablet-3": 2,
    "laptop-1": 3,
    "laptop-2": 3,
    "desktop-1": 4,
}
"""Clients of the demo, and how many blocks the memory of each has room for."""

APART = "tablet-3"
"""The client with a replica of its own; it sits out the middle half of the rounds."""


@dataclass(frozen=True)
class DemoSettings:
    """Settings of ``zorba demo``.

    Attributes:
        clients: their names, and how many blocks the memory of each has room for; ``APART`` is one.
        rounds: rounds of the federation.
        seed: of the data split, the order of batches and the noise.
        trainable: how many of the model's last blocks are trained; the others stay frozen.
        perturbations: P, finite differences a client measures in a local step.
        local_steps: K, local steps in a round.
        lr: learning rate of the first round; it falls linearly to 0.
        eps: distance at which losses are taken.
        clip: largest absolute value of a scalar.
        distribution: of the noise.
        batch_size: sentences in a batch, half of each label.
        pool: sentences a client trains on; their frozen prefix is computed once.
        longest: tokens of the longest training prompt.
        alpha: concentration of the Dirichlet split over clients.
        evaluations: how often the held-out set is scored during training.
        out: folder for the summary and the pictures.
        cache: folder for the model and the data.
    """

    clients: Mapping[str, int] = field(default_factory=lambda: dict(CLIENTS))
    rounds: int = 50
    seed: int = 1
    trainable: int = 4
    perturbations: int = 5
    local_steps: int = 1
    lr: float = 1.6e-2
    eps: float = 1e-3
    clip: float = 3.0
    distribution: Distribution = "rademacher"
    batch_size: int = 8
    pool: int = 96
    longest: int = 24
    alpha: float = 0.5
    evaluations: int = 5
    out: Path = Path("runs/demo")
    cache: Path = Path(".cache")

    def sits_out(self, round_number: int) -> bool:
        """Whether the client apart is away in a round (counted from 1): the middle half."""
        return self.rounds / 4 < round_number <= 3 * self.rounds / 4
