"""Settings: what all methods of the comparison have in common, and what each has of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The clients, and the share of the model's blocks that the budget of each has room for. The other
# methods need the whole model on every client: these budgets bind ZorBA alone.
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


@dataclass(frozen=True)
class Plan:
    """How long a method runs, and its options."""

    title: str
    color: str  # in the pictures
    options: dict[str, Any]  # of the method's class
    rounds: int = 100
    every: int = 25  # rounds between evaluations
    local_steps: int = 1  # batches that a client works on in a round


PLANS = {
    "zorba": Plan("ZorBA", "#c8553d", {"lr": 3e-4}),
    "fedavg-lora": Plan(
        "FedAvg with LoRA, AdamW (FedIT)", "#8a63a6", {"lr": 3e-4}, 12, every=2, local_steps=4
    ),
    "decomfl": Plan("full-model ZO (DeComFL)", "#3b6fa0", {"lr": 1e-4}),
    "fedkseed": Plan("seed-pool ZO (FedKSeed)", "#5b9e6f", {"lr": 3e-4, "pool": 1024}),
    "mezo": Plan("MeZO, one machine", "#888888", {"lr": 1e-4}),
}


@dataclass(frozen=True)
class Settings:
    """What a comparison is made with."""

    seed: int = 1  # of the data split, the order of batches, adapters and noise
    alpha: float = 0.5  # concentration of the Dirichlet split of each label over the clients
    pool: int = 96  # sentences that a client trains on; every client gets so many at least
    batch_size: int = 8
    longest: int = 16  # tokens of the longest training prompt
    measured_shape: tuple[int, int] = (16, 40)  # sentences, tokens, for memory and time
    subset: int = 3  # the curve is taken on every so-manieth sentence, its end on all of them too
    eps: float = 1e-3  # distance at which zeroth-order methods take losses
    measured_rounds: int = 3  # of a client in a process of its own
    cache: Path = Path(".cache")
    out: Path = Path("runs/compare")
