"""One client in a process of its own: how much memory it takes, and how long a round.

Everything that any method needs is imported by this module, so that all have the same baseline.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from zorba.apps.plan.measure import own_memory
from zorba.hf import find_blocks
from zorba.machine import GIVING_BACK, run_apart
from zorba.offload import Offload

from benchmarks.compare.loop import run_round
from benchmarks.compare.methods import make_method
from benchmarks.compare.settings import PLANS, Settings
from benchmarks.compare.task import AnswerLoss, load_model, measured_work

_IMPORTED = (peft, transformers)
_ANSWERS = (5, 9)  # any two tokens: memory and time do not depend on which


@dataclass(frozen=True)
class Row:
    """A client that is measured."""

    method: str  # key of PLANS
    client: str = "client"  # whose mask ZorBA's client has; those of other methods are all alike
    options: tuple[tuple[str, Any], ...] = ()  # that differ from the method's

    @property
    def key(self) -> str:
        """Name in the results."""
        return " ".join([self.method, self.client, *(name for name, _ in self.options)])


ROWS = (
    *(Row("zorba", name) for name in ("phone-1", "tablet-1", "laptop-1", "laptop-2", "desktop-1")),
    *(Row(name) for name in ("decomfl", "fedkseed", "mezo", "fedavg-lora")),
    Row("fedavg-lora", options=(("checkpointing", True),)),
)


def client(
    ready: Any, row: Row, mask: Sequence[bool], settings: Settings, folder: Path, threads: int
) -> list[float]:
    """The life of a client, for ``run_apart``: model, some rounds with a server that has only it.

    Returns the seconds of each round.
    """
    torch.set_num_threads(threads)
    ready()
    model = load_model(folder)
    with tempfile.TemporaryDirectory(dir=settings.out) as scratch:
        here = Path(scratch)
        if row.method == "zorba":  # its idle blocks stream from files
            blocks = zip(find_blocks(model), mask, strict=True)
            Offload(model, [block.name for block, on in blocks if on], folder=here / "idle")
        else:
            own_memory(model, "cpu")
        work = measured_work(AnswerLoss(model, _ANSWERS), row.client, settings.measured_shape)
        own = replace(settings, out=here)
        method = make_method(row.method, work, own, {row.client: mask}, **dict(row.options))
        rounds = range(1, settings.measured_rounds + 1)
        return [run_round(method, r, [row.client])["seconds"] for r in rounds]


def measure(row: Row, mask: Sequence[bool], settings: Settings, folder: Path) -> dict[str, Any]:
    """Measures a client of ``ROWS`` with the model in ``folder``.

    Returns its peak bytes of anonymous memory above the baseline, and seconds of a round. Of the
    blocks ``mask`` are active, bool [blocks]; all of them for other methods than ZorBA.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    arguments = (row, mask, settings, folder, torch.get_num_threads())
    seen = run_apart(client, *arguments, environment=GIVING_BACK)
    return {
        "method": row.method,
        "client": row.client,
        "options": dict(row.options),
        "local_steps": PLANS[row.method].local_steps,
        "active_blocks": sum(mask),
        "blocks": len(mask),
        "seconds": seen.result,
        "peak_bytes": seen.above,
        "baseline_bytes": seen.baseline,
        # The first round also finds out how the model uses its weights.
        "seconds_round": statistics.median(seen.result[1:] or seen.result),
    }
