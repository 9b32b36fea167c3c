"""Prefix reuse: blocks that no perturbation can reach run once a step.

Where the first blocks of a stack hold no active parameter and nothing active runs in front of
them, their output is the same in every evaluation of a step. The first evaluation keeps it; in the
others these blocks hand through what they get, and the last of them returns what was kept. The
model's own forward runs as always, with its masks, positions and heads.

It is exact: a block is skipped only while all tensors that the stack was given are equal to those
of the first evaluation, bit for bit, and random generators continue from their state behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import zorba_kernels as zk
from zorba.blocks import find_blocks
from zorba.forward import replaced_forward
from zorba.optim.owners import key_of
from zorba.optim.placement import Placement
from zorba.optim.thread import GeneratorState


class ReuseError(BaseException):
    """Blocks were skipped that should have run: the evaluation must be repeated without reuse."""

    # Not an Exception: a closure that catches those would hide it, and return a wrong loss.


@dataclass
class _Call:
    """What a block did in one call of the first evaluation."""

    inputs: list[Tensor]  # behind the first block without hidden states, which are handed through
    output: Tensor | None  # hidden states; kept for the last block of the prefix alone
    rest: Any  # other members of its output; None where it is a plain tensor
    generators: GeneratorState | None  # behind it; in training mode alone


@dataclass
class _Stack:
    """Leading blocks of one stack that hold no active parameter."""

    modules: list[nn.Module] = field(default_factory=list)
    calls: list[dict[int, _Call]] = field(default_factory=list)  # by call of the stack, by block
    at: int = -1  # the running call of the stack in this evaluation
    skipping: bool = False


class PrefixReuse:
    """Skips, for the length of a session, what one evaluation of a step has computed already.

    It is ``enabled`` where the model has blocks in front of everything that the placement perturbs.
    """

    def __init__(self, model: nn.Module, placement: Placement) -> None:
        self._model, self._placement = model, placement
        self._active = [owner.module for owner in placement.owners]
        self._stacks = _prefixes(model, placement.table)
        self.enabled = bool(self._stacks)
        self._recording = False
        self._open: _Stack | None = None  # the stack that is being recorded
        self._unfilled: list[Any] = []  # key-value caches that skipped blocks were given

    @contextmanager
    def session(self) -> Iterator[None]:
        """Context of a step; the model is as it was after it."""
        with ExitStack() as stack:
            stack.callback(self.forget)
            if self.enabled:
                for prefix in self._stacks:
                    for number, module in enumerate(prefix.modules):
                        forward = partial(self._forward, prefix, number, module.forward)
                        stack.enter_context(replaced_forward(module, forward))
                # Hooks, not the stack's order: an active module may run between frozen blocks.
                for module in self._active:
                    stack.enter_context(module.register_forward_pre_hook(self.close))
            yield

    def begin(self) -> None:
        """Marks the start of an evaluation: the first one is kept."""
        self._recording = not any(stack.calls for stack in self._stacks)
        self._open = None
        self._unfilled.clear()
        for stack in self._stacks:
            stack.at, stack.skipping = -1, False

    @property
    def modules(self) -> set[nn.Module]:
        """Blocks that run in one evaluation of a step and are skipped in the others."""
        return {m for stack in self._stacks for m in stack.modules} if self.enabled else set()

    @property
    def kept(self) -> bool:
        """Whether the first evaluation has kept anything."""
        return any(call for stack in self._stacks for call in stack.calls)

    def forget(self) -> None:
        """Forgets what was kept: the next evaluation is the first one again."""
        self._unfilled.clear()
        for stack in self._stacks:
            stack.calls.clear()

    def disable(self) -> None:
        """Reuses nothing from here on."""
        self.enabled = False
        self.forget()

    def close(self, *hook_arguments: Any) -> None:
        """Says that active parameters are used now: what runs from here on is no prefix."""
        self._open = None

    def limit(self) -> None:
        """Reuses no more blocks than the first evaluation has kept, in later steps as well."""
        # Later steps are not watched: a use of an active parameter without its module, which ended
        # the prefix in the first evaluation, would not ``close`` it there.
        for stack in self._stacks:
            del stack.modules[min(map(len, stack.calls), default=0) :]

    def _forward(
        self, stack: _Stack, number: int, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The forward of a block within a session."""
        if not self.enabled:
            return original(*args, **kwargs)
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states", None)
        inputs = _tensors([args[1:], rest] if number else [hidden, args[1:], rest])
        if number == 0:
            caches = [v for v in (*args, *kwargs.values()) if hasattr(v, "get_seq_length")]
            self._enter(stack, inputs, caches)
        call = stack.calls[stack.at].get(number) if stack.skipping else None
        if call is None:
            output = original(*args, **kwargs)
            if self._open is stack:
                self._record(stack, number, hidden, inputs, output)
            return output
        # Those of the first block were compared by ``_enter``.
        if not isinstance(hidden, Tensor) or (number and not _equal(call.inputs, inputs)):
            raise ReuseError
        if call.generators is not None:
            call.generators.rewind()  # what runs between blocks may draw as well
        if call.output is not None:
            hidden = call.output.clone()  # whoever reads it may write it
        return hidden if call.rest is None else (hidden, *call.rest)

    def _enter(self, stack: _Stack, inputs: list[Tensor], caches: list[Any]) -> None:
        """The first block of a stack is called: does what was kept fit?"""
        if any(cache is unfilled for cache in caches for unfilled in self._unfilled):
            raise ReuseError  # skipped blocks have put nothing into it, and now it is read
        # Positions that earlier forwards left in a cache are inputs that nothing here compares.
        continues = any(map(_length, caches))
        stack.at += 1
        stack.skipping = False
        if self._recording:
            stack.calls.append({})
            self._open = None if continues else stack
        elif stack.at < len(stack.calls) and stack.calls[stack.at] and not continues:
            stack.skipping = _equal(stack.calls[stack.at][0].inputs, inputs)
            # They hold no positions of skipped blocks: fine, unless somebody goes on from there.
            if stack.skipping:
                self._unfilled += caches

    def _record(
        self, stack: _Stack, number: int, hidden: Any, inputs: list[Tensor], output: Any
    ) -> None:
        """Keeps the output of a block that continues the prefix; others end it."""
        kept = stack.calls[stack.at]
        result, rest = output, None
        if isinstance(output, tuple) and output:
            result, rest = output[0], output[1:]
        if (
            not (isinstance(hidden, Tensor) and isinstance(result, Tensor))
            or (result.shape, result.dtype) != (hidden.shape, hidden.dtype)
            or number >= len(stack.modules)
            or (number and number - 1 not in kept)
        ):
            self.close()
            return
        # Copies: models write to hidden states in place.
        if number == 0:
            inputs[0] = hidden.clone()
        else:
            kept[number - 1].output = None  # only the last one's is read
        generators = GeneratorState(self._placement.table.device) if self._model.training else None
        kept[number] = _Call(inputs, result.clone(), rest, generators)


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
            stacks.setdefault(name, _Stack()).modules.append(block.module)
    return list(stacks.values())
