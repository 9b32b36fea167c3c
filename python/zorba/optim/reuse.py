"""Prefix reuse: blocks that no perturbation can reach run once a step.

Where the first blocks of a stack hold no active parameter and nothing active runs in front of
them, their output is the same in every evaluation of a step. The first evaluation keeps it; in the
others these blocks hand through what they get, and the last of them returns what was kept (or each
its own output, where the model reads them). The model's own forward runs as always, with its masks,
positions and heads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import zorba_kernels as zk
from zorba.blocks import find_blocks
from zorba.forward import replaced_forward
from zorba.optim.generators import GeneratorState
from zorba.optim.owners import Owner, key_of


class ReuseError(BaseException):
    """Blocks were skipped that should have run: the evaluation must be repeated without reuse."""

    # Not an Exception: a closure that catches those would hide it, and return a wrong loss.


@dataclass
class _Call:
    """What a block did in one call of the first evaluation."""

    inputs: list[Tensor]  # besides the hidden states, which only the first block compares
    hidden_in: list[Tensor]  # of the first block
    hidden_out: Tensor | None  # kept for the last block of the prefix alone
    rest: Any  # other members of its output; None where it is a plain tensor
    generators: GeneratorState | None  # behind it; in training mode alone


@dataclass
class _Stack:
    """Leading blocks of one stack that hold no active parameter."""

    modules: list[nn.Module]
    limit: int = sys.maxsize  # how many of them may be reused
    calls: list[dict[int, _Call]] = field(default_factory=list)  # by call of the stack, by block
    at: int = -1  # the running call of the stack
    skipping: bool = False

    def rewind(self) -> None:
        """To in front of its first call in an evaluation."""
        self.at, self.skipping = -1, False


class PrefixReuse:
    """Skips, for the length of a session, what one evaluation of a step has computed already.

    Args:
        model: a model with transformer blocks; without any, nothing is reused.
        table: its active parameters.
        owners: modules that hold them.

    Attributes:
        enabled: whether there is anything to reuse.
        everything: whether the output of every block is kept, for models that read more than that
            of the last one: hidden states of several layers, skips between blocks.
    """

    def __init__(self, model: nn.Module, table: zk.ParamTable, owners: Sequence[Owner]) -> None:
        self._model = model
        self._device = table.device
        self.everything = False
        self._stacks = _prefixes(model, table)
        self._owners = owners
        self.enabled = bool(self._stacks)
        self._recording = False
        self._open: _Stack | None = None  # the stack that is being recorded
        self._evaluations = 0
        self._unfilled: list[Any] = []  # key-value caches that skipped blocks were given

    @contextmanager
    def session(self, device: torch.device) -> Iterator[None]:
        """Context of a step; the model, whose generators are the device's, is as it was after."""
        self._device = device
        self._evaluations = 0
        with ExitStack() as stack:
            stack.callback(self._forget)
            if self.enabled:
                for prefix in self._stacks:
                    for number, module in enumerate(prefix.modules):
                        forward = partial(self._forward, prefix, number, module.forward)
                        stack.enter_context(replaced_forward(module, forward))
                # Hooks, not the stack's order: an active module may run between frozen blocks.
                for owner in self._owners:
                    stack.enter_context(owner.module.register_forward_pre_hook(self.close))
            yield

    def begin(self) -> None:
        """Marks the start of an evaluation."""
        self._recording = self._evaluations == 0
        self._evaluations += 1
        self._open = None
        self._unfilled.clear()
        for stack in self._stacks:
            stack.rewind()

    @property
    def modules(self) -> set[nn.Module]:
        """Blocks that run in one evaluation of a step and are skipped in the others."""
        return {m for stack in self._stacks for m in stack.modules} if self.enabled else set()

    @property
    def kept(self) -> bool:
        """Whether the first evaluation has kept anything."""
        return any(call for stack in self._stacks for call in stack.calls)

    def restart(self) -> None:
        """Forgets what was kept: the next evaluation is the first one again."""
        self._evaluations = 0
        self._forget()

    def disable(self) -> None:
        """Reuses nothing from here on."""
        self.enabled = self._recording = False
        self._forget()

    def _forget(self) -> None:
        self._unfilled.clear()
        for stack in self._stacks:
            stack.calls.clear()
            stack.rewind()

    def close(self, *arguments: Any) -> None:
        """Says that active parameters are used now: what runs from here on is no prefix."""
        self._open = None

    def limit(self) -> None:
        """Reuses no more blocks than the first evaluation has kept, in later steps as well."""
        # Later steps are not watched: a use of an active parameter without its module, which ended
        # the prefix in the first evaluation, would not ``close`` it there.
        for stack in self._stacks:
            # A stack that is called several times must have kept as much in each of its calls.
            lengths = {len(call) for call in stack.calls}
            stack.limit = lengths.pop() if len(lengths) == 1 else 0
            if not stack.limit:
                stack.calls.clear()

    def _forward(
        self, stack: _Stack, number: int, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The forward of a block within a session."""
        if not self.enabled:
            return original(*args, **kwargs)
        # Exact: a block is skipped only while all tensors that the stack was given are equal to
        # those of the first evaluation, bit for bit, and random generators continue from their
        # state behind it.
        hidden, others = _inputs(args, kwargs)
        if number == 0:
            caches = [v for v in (*args, *kwargs.values()) if hasattr(v, "get_seq_length")]
            self._enter(stack, hidden, others, caches)
        if stack.skipping and number in stack.calls[stack.at]:
            return _replay(stack.calls[stack.at][number], hidden, others)
        output = original(*args, **kwargs)
        if self._recording and self._open is stack:
            self._record(stack, number, hidden, others, output)
        return output

    def _enter(
        self, stack: _Stack, hidden: Tensor | None, others: list[Tensor], caches: list[Any]
    ) -> None:
        """The first block of a stack is called: does what was kept fit?"""
        if any(cache is unfilled for cache in caches for unfilled in self._unfilled):
            raise ReuseError  # skipped blocks have put nothing into it, and now it is read
        # Positions that earlier forwards left in a cache are inputs that nothing here compares.
        continues = any(_length(cache) > 0 for cache in caches)
        stack.at += 1
        stack.skipping = False
        if self._recording:
            stack.calls.append({})
            self._open = None if continues else stack
        elif stack.at < len(stack.calls) and stack.calls[stack.at] and not continues:
            kept = stack.calls[stack.at][0]
            given = others if hidden is None else [hidden, *others]
            stack.skipping = _equal([*kept.hidden_in, *kept.inputs], given)
            # They hold no positions of skipped blocks: fine, unless somebody goes on from there.
            if stack.skipping:
                self._unfilled += caches

    def _record(
        self, stack: _Stack, number: int, hidden: Tensor | None, others: list[Tensor], output: Any
    ) -> None:
        call = stack.calls[stack.at]
        result, rest = output, None
        if isinstance(output, tuple) and output:
            result, rest = output[0], output[1:]
        if (
            not isinstance(hidden, Tensor)
            or not isinstance(result, Tensor)
            or (result.shape, result.dtype) != (hidden.shape, hidden.dtype)
            or number >= stack.limit
            or (number and number - 1 not in call)
        ):
            # Not handed through from block to block, or one in front of it was not kept.
            self._open = None
            return
        # Only the last block of a prefix is read, so only its output is kept: one hidden state.
        if number and not self.everything:
            call[number - 1].hidden_out = None
        # Copies: models write to hidden states in place.
        call[number] = _Call(
            others,
            [hidden.clone()] if number == 0 else [],
            result.clone(),
            rest,
            GeneratorState(self._device) if self._model.training else None,
        )


def _replay(call: _Call, hidden: Tensor | None, others: list[Tensor]) -> Any:
    if hidden is None or not _equal(call.inputs, others):
        raise ReuseError
    if call.hidden_out is not None:
        hidden = call.hidden_out.clone()  # whoever reads it may write it
    if call.generators is not None:
        call.generators.rewind()  # what runs between blocks may draw as well
    return hidden if call.rest is None else (hidden, *call.rest)


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, list[Tensor]]:
    """The hidden states, and all other tensors that a block is given."""
    rest = dict(kwargs)
    hidden = args[0] if args else rest.pop("hidden_states", None)
    return (hidden if isinstance(hidden, Tensor) else None), _tensors([args[1:], rest])


def _tensors(value: Any) -> list[Tensor]:
    """Those in tuples, lists and dicts; a key-value cache is none of them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, (tuple, list)) else []


def _length(cache: Any) -> int:
    """Positions in a key-value cache; 0 for one of states alone, which cannot tell."""
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return 0


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    # The same tensor needs no look: models hand one mask to all blocks.
    return len(a) == len(b) and all(
        x is y or (x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


def _prefixes(model: nn.Module, table: zk.ParamTable) -> list[_Stack]:
    active = {key_of(entry.source) for entry in table.entries}
    if getattr(getattr(model, "config", None), "num_kv_shared_layers", None):
        return []  # late blocks read the keys and values of early ones
    try:
        blocks = find_blocks(model)
    except ValueError:
        return []
    stacks: dict[str, _Stack] = {}
    ended: set[str] = set()
    for block in blocks:
        name = block.name.rpartition(".")[0]
        # By storage: a frozen block may share its weights with an active module.
        if any(key_of(p) in active for p in block.module.parameters()):
            ended.add(name)
        if name not in ended:
            stacks.setdefault(name, _Stack([])).modules.append(block.module)
    return list(stacks.values())
