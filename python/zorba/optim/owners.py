"""Which modules hold active parameters, where perturbed weights must appear, and which use them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zorba_kernels as zk
from zorba.tables import padded_bytes, views_in


class Owner:
    """Active parameters that a module holds itself, and the scratch that they may read."""

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[tuple[str, nn.Parameter]],
        whole: zk.ParamTable,
        level: int,
        held: bool = False,
    ) -> None:
        self.module = module  # whose forward reads them
        self.level = level  # how many owners it is nested in
        self.held = held  # whether they read scratch for whole evaluations, not in that forward
        # Several of one name where equal weights are tied by their storage alone.
        self._parameters = parameters
        self.parameter_names = [name for name, _ in parameters]
        self.names = set(self.parameter_names)
        local = {id(p): name for name, p in module.named_parameters(recurse=False)}
        self.local_names = [local.get(id(p), name) for name, p in parameters]  # in the module
        self._weights = {e.name: e.tensor for e in whole.entries if e.name in self.names}
        groups = {e.name: e.group for e in whole.entries if e.name in self.names}
        self._table_of = partial(zk.ParamTable, groups=groups, num_groups=whole.num_groups)
        self._targets: dict[int, tuple[zk.ParamTable, list[Tensor]]] = {}
        self.weights = [self._weights[name] for name, _ in self._parameters]  # one a parameter
        self.groups = frozenset(groups.values())
        self.nbytes = sum(map(padded_bytes, self._weights.values()))  # of scratch
        self.depth = 0  # how many forwards of the module are running: it may call itself
        self.buffer: Tensor | None = None  # scratch that the parameters read now
        # What they read before that: weights, or scratch of a module around this one that is tied.
        self.before: list[Tensor] = []

    @cached_property
    def table(self) -> zk.ParamTable:
        """The parameters' weights; made when asked for: not every placement needs it."""
        return self._table_of(self._weights)

    def target(self, buffer: Tensor) -> tuple[zk.ParamTable, list[Tensor]]:
        """Returns views of the buffer like the parameters: a table, and one a parameter."""
        # Kept: making a table costs more than the pass over a small module. Buffers live as long
        # as their placement, so that an address means one buffer.
        key = buffer.data_ptr()
        if key not in self._targets:
            views = views_in(buffer, self._weights)
            self._targets[key] = self._table_of(views), [views[n] for n, _ in self._parameters]
        return self._targets[key]

    def shown(self) -> list[Tensor]:
        """Returns what the parameters read."""
        return [p.data for _, p in self._parameters]

    def point_to(self, tensors: Sequence[Tensor]) -> None:
        """Lets the parameters read these tensors, one a parameter."""
        # ``.data`` is exchanged, not the parameter: whoever holds the parameter (the module, tied
        # modules, optimizers) sees the exchange.
        for (_, p), tensor in zip(self._parameters, tensors, strict=True):
            p.data = tensor


def find_owners(model: nn.Module, table: zk.ParamTable, held: Collection[str] = ()) -> list[Owner]:
    """Returns every module that holds an active parameter itself; a tied one has several owners.

    Those named in ``held`` have one owner together, the model, at the end. Raises ValueError where
    a parameter of the table is in no module, or twice in one.
    """
    # Parameters are told apart by their storage, not their identity: two of them may be views of
    # the same weights (``b.weight.data = a.weight.data``), and both must show the noise.
    wanted = {key_of(entry.source): entry.name for entry in table.entries}
    owners: list[Owner] = []
    paths: set[str] = set()
    together: list[tuple[str, nn.Parameter]] = []
    for path, module in model.named_modules():
        mine: dict[str, nn.Parameter] = {}
        for p in module._parameters.values():
            name = wanted.get(key_of(p)) if p is not None else None
            if p is None or name is None:
                continue
            if name in mine:
                raise ValueError(
                    f"module {path!r} holds the weights of {name!r} under two names: keep one"
                )
            if name in held:
                together.append((name, p))
            else:
                mine[name] = p
        if mine:
            parts = path.split(".") if path else []
            above = {".".join(parts[:i]) for i in range(len(parts))}
            owners.append(Owner(module, list(mine.items()), table, len(above & paths)))
            paths.add(path)
    if together:
        level = 1 + max((owner.level for owner in owners), default=-1)
        owners.append(Owner(model, together, table, level, held=True))
    found = {name for owner in owners for name in owner.names}
    lost = [name for name in (*table.names, *held) if name not in found]
    if lost:
        raise ValueError(
            f"these parameters belong to no module of the model: {', '.join(lost[:5])}"
        )
    return owners


def key_of(p: Tensor) -> object:
    """Returns a key that is the same for parameters with the same weights: where these are."""
    # An empty tensor has no address, and nothing in it could be tied.
    return (p.data_ptr(), p.dtype, p.shape, p.stride()) if p.numel() else id(p)


class Probe(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds out how an evaluation uses the parameters: through their modules, or directly."""

    def __init__(
        self, owners: Sequence[Owner], table: zk.ParamTable, on_functional: Callable[[], None]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.functional: set[str] = set()  # read outside of forwards of their modules
        self.unread = set(table.names)  # not used at all
        self._on_functional = on_functional
        self._owners = owners
        self._inside: Counter[str] = Counter()  # forwards of its modules that are running
        # By storage, so that an operation costs one look-up, not one comparison a parameter.
        self._spans: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
        for entry in table.entries:
            if entry.tensor.numel():
                storage = entry.tensor.untyped_storage().data_ptr()
                self._spans[storage].append((*_span(entry.tensor), entry.name))

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watches what runs inside."""
        with ExitStack() as stack:
            for owner in self._owners:
                # In front of other hooks: what these read is no use by the model.
                enter, leave = (partial(self._count, owner.names, n) for n in (1, -1))
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
            if not isinstance(value, Tensor) or value.layout != torch.strided or not value.numel():
                continue
            # Several parameters may be slices of one storage: the addresses tell which is read.
            start, end = _span(value)
            for first, last, name in self._spans.get(value.untyped_storage().data_ptr(), ()):
                if first < end and start < last and not self._inside[name]:
                    self.functional.add(name)
                    self.unread.discard(name)
                    self._on_functional()
        return func(*args, **(kwargs or {}))

    def _count(self, names: set[str], change: int, *hook_arguments: Any) -> None:
        for name in names:
            self._inside[name] += change
        self.unread.difference_update(names)


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and one past the last address of a tensor's elements."""
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()
