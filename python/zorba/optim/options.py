"""What a step works on: its options, checked, and the parameters that are active."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import zorba_kernels as zk
from zorba.blocks import find_blocks
from zorba.defaults import DIRECTIONS, ESTIMATORS
from zorba.offload import Offload
from zorba_kernels.noise import DISTRIBUTIONS, ROUNDINGS, VERSIONS, canonical_name
from zorba_kernels.program import check_choice, check_uint64, integer

Blocks = str | Sequence[bool] | Tensor

# Kernels take subnormal coefficients for 0, on every device: their flush modes differ.
_TINY = torch.finfo(torch.float32).tiny

# Options that groups of parameters may differ in, and their least values. The others make the
# directions and the scalars, which all groups share: one scalar a direction is what a trajectory
# records.
GROUP_OPTIONS = {"lr": 0.0, "eps": _TINY, "weight_decay": 0.0}


def check_options(**options: Any) -> dict[str, Any]:
    """Returns options of ``ZerothOrderSGD`` with its state; raises TypeError or ValueError."""
    count = integer(options["num_perturbations"], "num_perturbations")
    if count < 1:
        raise ValueError(f"num_perturbations must be at least 1, got {count}")
    if not 0.0 <= options["momentum"] < 1.0:
        raise ValueError(f"momentum must be at least 0 and below 1, got {options['momentum']!r}")
    if options["clip"] is not None:
        _check_number("clip", options["clip"], _TINY)
    check_choice("estimator", options["estimator"], ESTIMATORS)
    check_choice("distribution", options["distribution"], DISTRIBUTIONS)
    check_choice("rounding", options["rounding"], ROUNDINGS)
    check_choice("directions", options["directions"], DIRECTIONS)
    each = integer(options["examples_per_direction"], "examples_per_direction")
    if each < 1:
        raise ValueError(f"examples_per_direction must be at least 1, got {each}")
    _check_group(options)
    own = {"num_perturbations": count, "seed": check_uint64(options["seed"], "seed")}
    # ``step`` is the number of the next one. Noise of another version would make another run.
    version = VERSIONS[options["distribution"]]
    return {**options, **own, "step": 0, "noise_version": version}


def _check_group(options: Mapping[str, Any]) -> None:
    for name, least in GROUP_OPTIONS.items():
        _check_number(name, options[name], least)


def _check_number(what: str, value: float, least: float) -> None:
    # Schedulers of torch may keep a learning rate in a tensor.
    if isinstance(value, Tensor):
        value = value.item()
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
        bound = "positive" if least > 0 else "at least 0"
        raise ValueError(f"{what} must be a finite number, {bound}, got {value!r}")


def param_groups(
    parameters: Mapping[str, nn.Parameter],
    groups: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Returns groups as ``torch.optim`` has them; the first holds what ``groups`` does not name."""
    left = dict(parameters)
    names = {id(p): name for name, p in parameters.items()}
    made: list[dict[str, Any]] = []
    for number, group in enumerate(groups):
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
        _check_group({**options, **group})
        made.append({**group, "params": mine})
    # What is left over is the first group, whose options are those of the step.
    return [{"params": list(left.values())}, *made] if left else made


def active_parameters(model: nn.Module, blocks: Blocks = "all") -> dict[str, nn.Parameter]:
    """Returns the parameters to fine-tune, by canonical name: those that require a gradient.

    Args:
        model: whose parameters to take.
        blocks: "all" for no other condition; "last:4" for the parameters of the last 4 transformer
            blocks; or a mask, one boolean a block in the order of ``zorba.hf.find_blocks``.

    Raises:
        ValueError: a mask of another length, a string that is neither, nothing left, or blocks that
            are off the device (``zorba.offload``).
    """
    wanted = {n: p for n, p in _named(model).items() if p.requires_grad}
    where = ""
    if not (isinstance(blocks, str) and blocks == "all"):
        where = f" in blocks={blocks!r}"
        found = find_blocks(model)
        mask = block_mask(blocks, len(found))
        inside = {n for block, on in zip(found, mask, strict=True) if on for n in block.parameters}
        wanted = {n: p for n, p in wanted.items() if n in inside}
    if not wanted:
        raise ValueError(f"the model has no parameter with requires_grad=True{where}")
    # Perturbed weights are made on the device: idle blocks, on the host, cannot be active.
    offload = Offload.of(model)
    away = [b for b in offload.blocks if b.name in offload.idle] if offload else []
    off = [block.name for block in away if wanted.keys() & set(block.parameters)]
    if off:
        raise ValueError(
            f"blocks={blocks!r} makes {', '.join(off[:5])} active, but they are off the device: "
            "give the mask of the blocks that Offload.active names, or make them active there"
        )
    return wanted


def block_mask(blocks: Blocks, count: int) -> list[bool]:
    """Returns one boolean a block for "last:N" or a mask, see ``active_parameters``."""
    if isinstance(blocks, str):
        kind, _, number = blocks.partition(":")
        if kind != "last" or not number.isdecimal() or not 1 <= int(number) <= count:
            raise ValueError(
                f"blocks is {blocks!r}; expected 'all', 'last:N' with N from 1 to {count}, or a "
                f"mask of {count} booleans"
            )
        return [b >= count - int(number) for b in range(count)]
    values = blocks.tolist() if isinstance(blocks, Tensor) else list(blocks)
    if len(values) != count or any(v not in (0, 1) for v in values):
        raise ValueError(f"blocks must be {count} booleans, one a block; got {values}")
    return [bool(v) for v in values]


def active_table(model: nn.Module, groups: Mapping[str, int] | None = None) -> zk.ParamTable:
    """Returns the table of a model's active parameters.

    ``groups`` are those of the active parameters, by canonical name; by default all that require a
    gradient are in group 0.
    """
    named = _named(model)
    if groups is None:
        groups = {n: 0 for n, p in named.items() if p.requires_grad}
    missing = sorted(set(groups) - set(named))
    if missing:
        raise ValueError(f"the model has no parameters named {missing}")
    return zk.ParamTable({n: named[n] for n in groups}, groups)


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    named: dict[str, nn.Parameter] = {}
    for full_name, p in model.named_parameters():
        # Noise is keyed by this name: a wrapper (DDP, torch.compile) must not change the run.
        name = canonical_name(full_name)
        if name in named:
            raise ValueError(f"two parameters are called {name!r} once wrapper prefixes are off")
        named[name] = p
    return named
