"""Settles weights that were perturbed ahead, before anything but a step uses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from zorba.optim.owners import find_owners
from zorba.optim.placement import InplacePlacement, Placement


def guard(model: nn.Module, placement: Placement) -> Callable[[], None]:
    """Settles the placement before the model's weights are used outside of a step.

    Hooks the forward of every module with active parameters, and ``state_dict`` of the model.

    Returns:
        A function that settles for the last time and removes the hooks.
    """
    assert isinstance(placement, InplacePlacement)

    def settle(*arguments: Any) -> None:
        if placement.ahead:
            placement.settle()

    owners = find_owners(model, placement.table)
    handles = [o.module.register_forward_pre_hook(settle) for o in owners if o.module is not None]
    handles.append(model.register_state_dict_pre_hook(settle))  # type: ignore[no-untyped-call]

    def unguard() -> None:
        settle()
        for handle in handles:
            handle.remove()

    return unguard
