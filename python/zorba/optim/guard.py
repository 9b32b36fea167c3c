"""Restores weights that were perturbed ahead, before anything but a step uses them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from zorba.optim.placement import InplacePlacement


class _Restore:
    """A hook. In a copy of the model it does nothing: the copy's weights are no placement's."""

    def __init__(self, placement: InplacePlacement | None = None) -> None:
        self.placement = placement

    def __call__(self, *arguments: Any) -> None:
        if self.placement is not None and self.placement.ahead:
            self.placement.restore()

    def __reduce__(self) -> tuple[type[_Restore], tuple[()]]:
        # deepcopy and pickle come here: a copy that held the placement would restore the original
        # model, and a placement with its table cannot be pickled at all.
        return _Restore, ()


def guard(model: nn.Module, placement: InplacePlacement) -> Callable[[], None]:
    """Restores the placement's weights before the model uses them outside of a step.

    Returns:
        A function that restores for the last time and removes the hooks.
    """
    # Forwards of the modules that hold active parameters, and both state dicts of all modules: each
    # may be called on a part of the model alone. Within a step weights are never ``ahead``, and the
    # hooks do nothing.
    restore = _Restore(placement)
    hooks = ExitStack()
    for owner in placement.owners:
        hooks.enter_context(owner.module.register_forward_pre_hook(restore))
    for module in model.modules():
        hooks.enter_context(module.register_state_dict_pre_hook(restore))  # type: ignore[no-untyped-call]
        hooks.enter_context(module.register_load_state_dict_pre_hook(restore))  # type: ignore[no-untyped-call]
    hooks.callback(restore)  # called first: the stack is undone from its end
    return hooks.close
