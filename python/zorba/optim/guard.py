"""Settles weights that were perturbed ahead, before anything but a step uses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from zorba.optim.owners import find_owners
from zorba.optim.placement import InplacePlacement, Placement


class _Settle:
    """A hook. A copy of the model has one that does nothing: its weights are its own affair."""

    def __init__(self, placement: InplacePlacement | None = None) -> None:
        self.placement = placement

    def __call__(self, *arguments: Any) -> None:
        if self.placement is not None and self.placement.ahead:
            self.placement.settle()

    def __reduce__(self) -> tuple[type[_Settle], tuple[()]]:
        return _Settle, ()


def guard(model: nn.Module, placement: Placement) -> Callable[[], None]:
    """Settles the placement before the model's weights are used outside of a step.

    Hooks the forward of every module with active parameters, and ``state_dict`` and
    ``load_state_dict`` of every module.

    Returns:
        A function that settles for the last time and removes the hooks.
    """
    assert isinstance(placement, InplacePlacement)
    settle = _Settle(placement)
    owners = find_owners(model, placement.table)
    handles = [o.module.register_forward_pre_hook(settle) for o in owners if o.module is not None]
    for module in model.modules():
        handles.append(module.register_state_dict_pre_hook(settle))  # type: ignore[no-untyped-call]
        handles.append(module.register_load_state_dict_pre_hook(settle))  # type: ignore[no-untyped-call]

    def unguard() -> None:
        settle()
        for handle in handles:
            handle.remove()

    return unguard
