"""Options of a step, checked, and groups of parameters that differ in some of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zorba.defaults import ESTIMATORS, Distribution, Estimator
from zorba_kernels.noise import DISTRIBUTIONS, NOISE_VERSION, ROUNDINGS, Rounding, canonical_name
from zorba_kernels.program import check_choice, check_uint64

# Options that groups of parameters may differ in. The others make the directions and the scalars,
# which all groups share: one scalar a direction is what a trajectory records.
GROUP_OPTIONS = ("lr", "eps", "weight_decay")

# Kernels take subnormal coefficients for 0, on every device: their flush modes differ.
_TINY = torch.finfo(torch.float32).tiny


@dataclass
class StepOptions:
    """What the state of ``ZerothOrderSGD`` tells of each group of parameters; see there.

    Attributes:
        step: number of the next step.
        noise_version: of the noise contract: another one would make another run.
    """

    lr: float
    eps: float
    num_perturbations: int
    estimator: Estimator
    distribution: Distribution
    rounding: Rounding
    weight_decay: float
    momentum: float
    clip: float | None
    seed: int
    step: int = 0
    noise_version: int = NOISE_VERSION

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            TypeError, ValueError: a bad one.
        """
        count = self.num_perturbations
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"num_perturbations must be an integer, got {count!r}")
        if count < 1:
            raise ValueError(f"num_perturbations must be at least 1, got {count}")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum!r}")
        if self.clip is not None:
            _check_number("clip", self.clip, _TINY)
        check_choice("estimator", self.estimator, ESTIMATORS)
        check_choice("distribution", self.distribution, DISTRIBUTIONS)
        check_choice("rounding", self.rounding, ROUNDINGS)
        self.seed = check_uint64(self.seed, "seed")
        check_group(vars(self))


def check_group(options: Mapping[str, Any]) -> None:
    """Raises ValueError for a bad number among the options that groups may differ in."""
    for name, least in zip(GROUP_OPTIONS, (0.0, _TINY, 0.0), strict=True):
        _check_number(name, options[name], least)


def param_groups(
    parameters: Mapping[str, nn.Parameter], groups: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """Returns groups as ``torch.optim`` has them; the first holds what ``groups`` does not name.

    Args:
        parameters: active ones, by canonical name.
        groups: dicts of "params" (names or parameters) and any of lr, eps and weight_decay.

    Raises:
        ValueError: an option that groups cannot differ in, a parameter that is not active or is in
            two groups, or a group without parameters.
    """
    # What is left over at the end is the first group, whose options are those of the step.
    left = dict(parameters)
    names = {id(p): name for name, p in parameters.items()}
    made: list[dict[str, Any]] = []
    for number, group in enumerate(groups or ()):
        if "params" not in group or set(group) - {"params", *GROUP_OPTIONS}:
            raise ValueError(
                f"group {number} has the keys {sorted(group)}; expected params and any of "
                f"{', '.join(GROUP_OPTIONS)}"
            )
        given = group["params"]
        mine = []
        for item in [given] if isinstance(given, (str, Tensor)) else given:
            name = canonical_name(item) if isinstance(item, str) else names.get(id(item))
            if name is None or name not in left:
                unknown = item if isinstance(item, str) else (name or "a parameter")
                raise ValueError(f"group {number}: {unknown} is not active, or in a group already")
            mine.append(left.pop(name))
        if not mine:
            raise ValueError(f"group {number} has no parameters")
        made.append({**group, "params": mine})
    rest = [{"params": list(left.values())}] if left else []
    return rest + made


def _check_number(what: str, value: float, least: float) -> None:
    # Schedulers of torch may keep a learning rate in a tensor.
    if isinstance(value, Tensor):
        value = value.item()
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
        bound = "positive" if least > 0 else "at least 0"
        raise ValueError(f"{what} must be a finite number, {bound}, got {value!r}")
