"""Settings: what all methods of the comparison have in common, and what each has of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

SHARES = {
    "phone-1": 0.25,
    "phone-2": 0.25,
    "tablet-1": 0.4,
    "tablet-2": 0.4,
    "tablet-3": 0.5,
    "laptop-1": 0.5,
    "laptop-2": 0.75,
    "desktop-1": 1.0,
}
"""The clients, and the share of the model's blocks that the budget of each has room for.

The other methods need the whole model on every client: these budgets bind ZorBA alone."""


@dataclass(frozen=True)
class Settings:
    """What a comparison is made with.

    Attributes:
        seed: of the data split, the order of batches, adapters and noise.
        alpha: concentration of the Dirichlet split of each label over the clients.
        pool: sentences that a client trains on; every client gets so many at least.
        batch_size: sentences in a training batch.
        longest: tokens of the longest training prompt.
        measured_shape: sentences and tokens of the batches that memory and time are measured with.
        subset: the curve is taken on every so-manieth sentence of the evaluation set; its last
            point is on all of them too.
        eps: distance at which zeroth-order methods take losses.
        methods: rounds, evaluations and options of each method.
        measured_rounds: of a client in a process of its own.
    """

    seed: int = 1
    alpha: float = 0.5
    pool: int = 96
    batch_size: int = 8
    longest: int = 16
    measured_shape: tuple[int, int] = (16, 40)
    subset: int = 3
    eps: float = 1e-3
    methods: dict[str, Plan] = field(default_factory=lambda: dict(PLANS))
    measured_rounds: int = 3
    cache: Path = Path(".cache")
    out: Path = Path("runs/compare")

    def changed(self, method: str, options: Mapping[str, Any], out: Path) -> Settings:
        """Returns settings with other options of a method, and another folder."""
        plan = self.methods[method]
        plan = replace(plan, options={**plan.options, **options})
        return replace(self, methods={**self.methods, method: plan}, out=out)


@dataclass(frozen=True)
class Plan:
    """How long a method runs, and its options.

    Attributes:
        title: as pictures show it.
        short: as the table shows it.
        rounds: of the federation.
        every: rounds between evaluations.
        local_steps: batches that a client works on in a round.
        options: of the method's class.
    """

    title: str
    short: str
    rounds: int
    every: int
    local_steps: int = 1
    options: dict[str, Any] = field(default_factory=dict)


_ROUNDS, _EVERY = 100, 25
PLANS = {
    "zorba": Plan("ZorBA", "ZorBA", _ROUNDS, _EVERY, 1, {"lr": 3e-4}),
    "fedavg-lora": Plan("FedAvg with LoRA, AdamW (FedIT)", "FedAvg-LoRA", 12, 2, 4, {"lr": 3e-4}),
    "decomfl": Plan("full-model ZO (DeComFL)", "DeComFL", _ROUNDS, _EVERY, 1, {"lr": 1e-4}),
    "fedkseed": Plan(
        "seed-pool ZO (FedKSeed)", "FedKSeed", _ROUNDS, _EVERY, 1, {"lr": 3e-4, "pool": 1024}
    ),
    "mezo": Plan("MeZO, one machine", "MeZO", _ROUNDS, _EVERY, 1, {"lr": 1e-4}),
}
