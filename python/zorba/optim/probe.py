"""Finds out how a closure uses the active parameters: through their modules, or directly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zorba_kernels as zk
from zorba.optim.owners import Owner


class Probe(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches one evaluation.

    Args:
        owners: modules that hold the active parameters.
        table: the active parameters.
        on_functional: called at every use that is none of a module's own.

    Attributes:
        reached: names of the parameters whose modules ran.
        functional: names of those that an operation read outside of a forward of their modules.
    """

    def __init__(
        self,
        owners: Sequence[Owner],
        table: zk.ParamTable,
        on_functional: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reached: set[str] = set()
        self.functional: set[str] = set()
        self._on_functional = on_functional
        self._owners = owners
        self._inside: dict[str, int] = dict.fromkeys(table.names, 0)
        # By storage, so that an operation costs one look-up, not one comparison a parameter.
        self._spans: dict[int, list[tuple[int, int, str]]] = {}
        for entry in table.entries:
            if entry.tensor.numel():
                storage = entry.tensor.untyped_storage().data_ptr()
                self._spans.setdefault(storage, []).append((*_span(entry.tensor), entry.name))

    @property
    def unread(self) -> set[str]:
        """Names of the parameters that the evaluation did not use at all."""
        return set(self._inside) - self.reached - self.functional

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watches what runs inside."""
        with ExitStack() as stack:
            for owner in self._owners:
                # In front of other hooks: what these read is no use by the model.
                enter, leave = partial(self._enter, owner), partial(self._leave, owner)
                register = stack.enter_context
                register(owner.module.register_forward_pre_hook(enter, prepend=True))
                register(owner.module.register_forward_hook(leave, always_call=True))
            stack.enter_context(self)
            yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Looks at every tensor that an operation is given."""
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value.layout == torch.strided and value.numel():
                self._look(value)
        return func(*args, **(kwargs or {}))

    def _look(self, value: Tensor) -> None:
        spans = self._spans.get(value.untyped_storage().data_ptr())
        if not spans:
            return
        # Several parameters may be slices of one storage: the addresses tell which is read.
        start, end = _span(value)
        for first, last, name in spans:
            if first < end and start < last and not self._inside[name]:
                self.functional.add(name)
                self._on_functional()

    def _enter(self, owner: Owner, module: nn.Module, args: tuple[Any, ...]) -> None:
        del module, args
        for name in owner.parameters:
            self._inside[name] += 1
            self.reached.add(name)

    def _leave(self, owner: Owner, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del module, args, output
        for name in owner.parameters:
            self._inside[name] -= 1


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and one past the last address of a tensor's elements."""
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()
