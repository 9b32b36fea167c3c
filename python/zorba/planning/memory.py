"""What a client's device holds, in bytes: the numbers that a plan is made from."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, SupportsIndex, get_args

from torch import nn

from zorba.blocks import Block, find_blocks
from zorba.offload.stream import BUFFERS

IdlePolicy = Literal["resident", "offload"]


@dataclass(frozen=True)
class MemoryModel:
    """Bytes on the device of a client, block by block.

    The memory of client n is ``fixed + sum_b (active[b] if a[n, b] else idle[b])``, and at most
    ``whole`` where every block is active: no idle block needs a buffer then, and no evaluation
    waits for another. A client that needs more than others has a smaller budget.
    """

    active: Sequence[int]  # bytes of each block where it is active
    idle: Sequence[int]  # bytes of each block where it is idle, at most its active bytes
    fixed: int = 0  # whatever the mask: embeddings, head, activations of a block, logits, scratch
    block_names: Sequence[str] | None = None  # block-0, block-1, ... where not given
    whole: int | None = None  # bytes with every block active, where that is less than the sum

    def __post_init__(self) -> None:
        # Python's integers: bytes stay exact where a float would round them.
        active = tuple(whole_bytes(v, f"active[{b}]") for b, v in enumerate(self.active))
        idle = tuple(whole_bytes(v, f"idle[{b}]") for b, v in enumerate(self.idle))
        default = tuple(f"block-{b}" for b in range(len(active)))
        names = unique_names(self.block_names or default, "block")
        if not active:
            raise ValueError("a memory model needs at least one block")
        for what, given in (("idle", idle), ("block_names", names)):
            if len(given) != len(active):
                raise ValueError(f"{what} has {len(given)} values for {len(active)} blocks")
        for name, on, off in zip(names, active, idle, strict=True):
            if off > on:
                raise ValueError(
                    f"block {name!r} takes {off:,} bytes idle, more than {on:,} active"
                )
        fixed = whole_bytes(self.fixed, "fixed")
        total = fixed + sum(active)
        whole = total if self.whole is None else min(total, whole_bytes(self.whole, "whole"))
        values = {"active": active, "idle": idle, "fixed": fixed, "whole": whole}
        self.__dict__.update(values, block_names=names)  # past the frozen fields

    def bytes_of(self, mask: Sequence[bool]) -> int:
        """Returns the bytes of a client, from its row of the mask, bool [B]."""
        if all(mask) and self.whole is not None:
            return self.whole
        rows = zip(self.active, self.idle, mask, strict=True)
        return self.fixed + sum(on if active else off for on, off, active in rows)


def model_weights_memory(
    model: nn.Module, blocks: Sequence[Block] | None = None, *, idle: IdlePolicy = "resident"
) -> MemoryModel:
    """Counts the weights of a model on the device, and nothing else.

    ``resident`` keeps idle blocks on the device: an idle block costs what an active one does, so a
    mask saves no memory in this model and every plan takes the same bytes. ``offload`` keeps them
    on the host, 0 bytes on the device, and adds two buffers of the largest block to stream them
    through, counted even if the plan leaves no block idle.

    Args:
        model: whose parameters are counted.
        blocks: that are planned, all of the model's by default. The model's other blocks are
            frozen, and idle everywhere: they take nothing.
        idle: where idle blocks live.

    Raises:
        ValueError: the model has no transformer blocks.
    """
    if idle not in get_args(IdlePolicy):
        raise ValueError(f"idle must be one of {get_args(IdlePolicy)}, not {idle!r}")
    found = find_blocks(model)
    blocks = found if blocks is None else blocks
    active = [block.nbytes for block in blocks]
    fixed = sum(p.nbytes for p in model.parameters()) - sum(block.nbytes for block in found)
    if idle == "offload":
        fixed += BUFFERS * max(block.nbytes for block in found)
    waiting = active if idle == "resident" else [0] * len(active)
    return MemoryModel(active, waiting, fixed, [block.name for block in blocks])


def whole_bytes(value: SupportsIndex | float, what: str) -> int:
    """Returns a count as an int; refuses negative, fractional and non-finite ones."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise ValueError(f"{what} must be a whole number of bytes, not {value!r}")
    number = operator.index(value)
    if number < 0:
        raise ValueError(f"{what} must not be negative, but is {number:,}")
    return number


def unique_names(names: Sequence[str], kind: str) -> tuple[str, ...]:
    """Returns the names as a tuple; refuses one that is not a string or comes twice."""
    for n, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise ValueError(f"{kind} names must be non-empty strings, not {name!r}")
        if name in names[:n]:
            raise ValueError(f"two {kind}s are named {name!r}")
    return tuple(names)
