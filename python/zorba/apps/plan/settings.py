"""PlanSettings: every knob of ``zorba plan``, written once."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional

from zorba.apps.command import by_commas, check_at_least
from zorba.defaults import ESTIMATOR, NUM_PERTURBATIONS, Estimator
from zorba.sizes import parse_bytes

# The fields that a client's memory depends on.
_WORKLOAD = ("batch_size", "length", "perturbations", "estimator", "loss", "dtype", "idle")


def read_budgets(text: str) -> dict[str, int]:
    """Returns the budget of each client, by name; a ValueError names what is wrong.

    The text is a list by commas, ``"phone=300MB,laptop=2GiB"``, or ``"300MB,2GiB"`` for client-0
    and client-1; or a file with one budget a line, or with a JSON object from name to budget.
    """
    # Not Path.is_file(), which raises where a list is too long for a name.
    content = Path(text).read_text() if os.path.isfile(text) else None
    pairs: list[tuple[str, str | int]] = []
    if content is not None and content.lstrip().startswith("{"):
        try:
            pairs = json.loads(content, object_pairs_hook=list)
        except ValueError as error:
            raise ValueError(f"{text} is no JSON: {error}") from error
    else:
        for part in text.split(",") if content is None else content.splitlines():
            name, equals, size = part.strip().rpartition("=")
            if size and not part.lstrip().startswith("#"):
                pairs.append((name.strip() if equals else f"client-{len(pairs)}", size))
    budgets: dict[str, int] = {}
    for name, amount in pairs:
        if name in budgets:
            raise ValueError(f"two budgets are for client {name!r}")
        try:
            budgets[name] = parse_bytes(amount)
        except ValueError as error:
            raise ValueError(f"budget of client {name!r}: {error}") from None
    if not budgets:
        raise ValueError(f"there are no budgets in {text!r}")
    return budgets


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


@dataclass(frozen=True)
class PlanSettings:
    """Plan which client activates which blocks, and predict what each will take.

    Budgets are bytes above what a process takes for its imports. The first plan of a workload
    calibrates: it runs two clients of three blocks of the model, in processes of their own.
    """

    # The comment of a field is its help on the command line.
    model: Positional[str]  # Folder or hub name of a language model, or its config.json.
    # phone=300MB,laptop=2GiB, or a file with one a line, or JSON.
    budgets: Annotated[dict[str, int], by_commas(read_budgets, "NAME=SIZE,NAME=SIZE")]
    batch_size: int = 16  # Sequences in a batch.
    length: int = 64  # Tokens of the longest sequence.
    perturbations: int = NUM_PERTURBATIONS  # P: directions a step.
    estimator: Estimator = ESTIMATOR  # central takes 2P losses a step, forward P + 1.
    loss: Literal["label-words", "text"] = "label-words"  # Of a few logits, or of all.
    # Of the weights; auto for the model's.
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    idle: Literal["offload", "resident"] = "offload"  # Where idle blocks live.
    # Weight of each block in F1, by commas; all alike by default.
    priorities: Annotated[tuple[float, ...], by_commas(_numbers, "FLOAT,FLOAT")] = ()
    min_coverage: int = 1  # Clients that must have each block active.
    min_active: int = 1  # Least active blocks of a client.
    max_active: int | None = None  # Most active blocks of a client.
    tolerance: float = 0.0  # How much F1 may rise to save memory; 0.05 is 5 %.
    measure: bool = False  # Run a client for each mask, and measure it.
    device: str = "cpu"  # cpu or cuda.
    calibration: Path = Path(".cache/calibration.json")  # File that keeps what this machine adds.
    out: Path = Path("runs/plan")  # Folder for plan.json and plan.png.

    def __post_init__(self) -> None:
        check_at_least(self, batch_size=1, length=1, perturbations=1, min_coverage=1, min_active=0)
        check_at_least(self, max_active=1)

    @property
    def workload(self) -> dict[str, Any]:
        """What a client's memory depends on, besides the model and its mask."""
        return {name: getattr(self, name) for name in _WORKLOAD}
