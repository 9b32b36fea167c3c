"""Makes the methods of the comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare.settings import Settings
from benchmarks.compare.zorba_method import Zorba
from benchmarks.peers.decomfl import DeComFL
from benchmarks.peers.fedavg_lora import FedAvgLora
from benchmarks.peers.fedkseed import FedKSeed
from benchmarks.peers.method import Method, Work
from benchmarks.peers.single_machine import SingleMachine


def make_method(
    name: str, work: Work, settings: Settings, masks: Mapping[str, Sequence[bool]]
) -> Method:
    """Returns a method on a replica of the original weights.

    Args:
        name: of the method, a key of ``settings.methods``.
        work: model and data.
        settings: of the comparison.
        masks: blocks that each client activates: ZorBA's, no other method has them.
    """
    plan = settings.methods[name]
    options: dict[str, Any] = {"seed": settings.seed, **plan.options}
    if name == "fedavg-lora":
        return FedAvgLora(work, local_steps=plan.local_steps, **options)
    options["eps"] = settings.eps
    if name == "mezo":
        return SingleMachine(work, **options)
    options["local_steps"] = plan.local_steps
    if name == "decomfl":
        return DeComFL(work, **options)
    if name == "fedkseed":
        return FedKSeed(work, **options)
    if name == "zorba":
        return Zorba(work, masks, folder=Path(settings.out), **options)
    raise ValueError(f"no method is called {name!r}: there are {', '.join(settings.methods)}")
