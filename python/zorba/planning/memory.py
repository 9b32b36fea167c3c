"""What a client's device holds, in bytes: the numbers that a plan is made from."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, SupportsIndex, get_args

import torch
from torch import nn

if TYPE_CHECKING:
    from zorba.blocks import Block

IdlePolicy = Literal["resident", "offload"]
PerClient = int | Sequence[int] | Mapping[str, int]
"""Bytes: one number for all clients, one a client in order, or by client name."""


@dataclass(frozen=True)
class MemoryModel:
    """Bytes on the device of a client, block by block.

    The memory of client n is ``fixed[n] + sum_b (active[b] if a[n, b] else idle[b])``, and at most
    ``whole[n]`` where every block is active. What can fill these fields can be planned with:
    ``weights_memory`` counts weights, ``memory_model`` puts calibrated bytes in the same places.

    Args:
        active: bytes of each block where it is active.
        idle: bytes of each block where it is idle, at most its active bytes.
        fixed: bytes that do not depend on the mask (context, embeddings and head, activations of
            one block, logits, scratch): one number for all clients, a sequence in client order,
            or a mapping from client name.
        block_names: names of the blocks; ``block-0``, ``block-1``, ... where not given.
        whole: bytes with every block active, where that is less than the sum: no idle block needs a
            buffer then, and no evaluation waits for another. As ``fixed``; None for the sum.
    """

    active: Sequence[int]
    idle: Sequence[int]
    fixed: PerClient = 0
    block_names: Sequence[str] | None = None
    whole: PerClient | None = None

    def __post_init__(self) -> None:
        # Python's integers: bytes stay exact where a float would round them.
        active = tuple(whole_bytes(v, f"active[{b}]") for b, v in enumerate(self.active))
        idle = tuple(whole_bytes(v, f"idle[{b}]") for b, v in enumerate(self.idle))
        if not active:
            raise ValueError("a memory model needs at least one block")
        if len(idle) != len(active):
            raise ValueError(f"idle has {len(idle)} blocks, active has {len(active)}")
        names = self.block_names
        names = [f"block-{b}" for b in range(len(active))] if names is None else names
        names = unique_names(names, "block")
        if len(names) != len(active):
            raise ValueError(f"block_names has {len(names)} names for {len(active)} blocks")
        for name, on, off in zip(names, active, idle, strict=True):
            if off > on:
                raise ValueError(
                    f"block {name!r} takes {off:,} bytes idle, more than {on:,} active"
                )
        object.__setattr__(self, "active", active)
        object.__setattr__(self, "idle", idle)
        object.__setattr__(self, "block_names", names)

    def fixed_bytes(self, clients: Sequence[str]) -> tuple[int, ...]:
        """Returns the fixed bytes of each client."""
        return _for_each(self.fixed, clients, "fixed")

    def all_active_bytes(self, clients: Sequence[str]) -> tuple[int, ...]:
        """Returns the bytes of each client with every block active."""
        sums = tuple(fixed + sum(self.active) for fixed in self.fixed_bytes(clients))
        if self.whole is None:
            return sums
        return tuple(map(min, sums, _for_each(self.whole, clients, "whole")))


def _for_each(values: PerClient, clients: Sequence[str], what: str) -> tuple[int, ...]:
    if isinstance(values, Mapping | Sequence):
        return per_client(values, clients, what)
    return (whole_bytes(values, what),) * len(clients)


def weights_memory(
    block_parameters: Sequence[int] | Mapping[str, int],
    *,
    fixed_parameters: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    idle: IdlePolicy = "resident",
    overhead: PerClient = 0,
) -> MemoryModel:
    """Counts the weights on the device, and nothing that was not given.

    ``resident`` keeps idle blocks on the device: an idle block costs what an active one does, so a
    mask saves no memory in this model and every plan with the same sizes takes the same bytes.
    ``offload`` keeps them on the host, 0 bytes on the device, and adds a double buffer to stream
    them through: the two largest blocks, counted even if the plan leaves no block idle.

    Args:
        block_parameters: number of parameters of each block, in order; a mapping names the blocks.
        fixed_parameters: parameters outside the blocks (embeddings, final norm, head).
        dtype: dtype of the weights.
        idle: where idle blocks live.
        overhead: further bytes (context, activations, logits, scratch), for all clients or each.
    """
    if idle not in get_args(IdlePolicy):
        raise ValueError(f"idle must be one of {get_args(IdlePolicy)}, not {idle!r}")
    names: Sequence[str] | None = None
    if isinstance(block_parameters, Mapping):
        names, block_parameters = tuple(block_parameters), tuple(block_parameters.values())
    sizes = [
        whole_bytes(count, f"parameters of block {b}") * dtype.itemsize
        for b, count in enumerate(block_parameters)
    ]
    fixed = whole_bytes(fixed_parameters, "fixed_parameters") * dtype.itemsize
    if idle == "offload":
        # One block computes while the next one arrives.
        fixed += sum(sorted(sizes)[-2:])
    total: PerClient
    if isinstance(overhead, Mapping):
        total = {name: fixed + whole_bytes(v, "overhead") for name, v in overhead.items()}
    elif isinstance(overhead, Sequence):
        total = [fixed + whole_bytes(v, "overhead") for v in overhead]
    else:
        total = fixed + whole_bytes(overhead, "overhead")
    return MemoryModel(sizes, sizes if idle == "resident" else [0] * len(sizes), total, names)


def model_weights_memory(
    model: nn.Module,
    blocks: Sequence[Block] | None = None,
    *,
    idle: IdlePolicy = "resident",
    overhead: PerClient = 0,
) -> MemoryModel:
    """Counts the weights of a model, as ``weights_memory``.

    Args:
        model: of one dtype.
        blocks: that are planned, all of the model's by default. The model's other blocks are
            frozen, and idle everywhere: they take nothing.
        idle: where idle blocks live.
        overhead: as ``weights_memory``.

    Raises:
        ValueError: the model has no transformer blocks.
    """
    from zorba.blocks import find_blocks

    found = find_blocks(model)
    inside = sum(block.numel for block in found)
    return weights_memory(
        {block.name: block.numel for block in (found if blocks is None else blocks)},
        fixed_parameters=sum(p.numel() for p in model.parameters()) - inside,
        dtype=next(model.parameters()).dtype,
        idle=idle,
        overhead=overhead,
    )


def whole_bytes(value: SupportsIndex | float, what: str) -> int:
    """Returns a count as an int; refuses negative, fractional and non-finite ones."""
    if isinstance(value, bool):
        raise ValueError(f"{what} must be a number of bytes, not {value}")
    try:
        exact = isinstance(value, float) and math.isfinite(value) and value.is_integer()
        number = int(value) if exact else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{what} must be a whole number, not {value!r}") from None
    if number < 0:
        raise ValueError(f"{what} must not be negative, but is {number:,}")
    return number


def unique_names(names: Sequence[str], kind: str) -> tuple[str, ...]:
    """Returns the names as a tuple; refuses one that is not a string or comes twice."""
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str) or not name:
            raise ValueError(f"{kind} names must be non-empty strings, not {name!r}")
        if name in seen:
            raise ValueError(f"two {kind}s are named {name!r}")
        seen.add(name)
    return tuple(names)


def per_client(
    values: Sequence[int] | Mapping[str, int], clients: Sequence[str], what: str
) -> tuple[int, ...]:
    """Returns whole byte counts in client order from a sequence or a mapping by client name."""
    if isinstance(values, Mapping):
        missing = [name for name in clients if name not in values]
        unknown = [name for name in values if name not in clients]
        if missing or unknown:
            raise ValueError(f"{what}: no bytes for clients {missing}, unknown clients {unknown}")
        return tuple(whole_bytes(values[name], f"{what} of client {name!r}") for name in clients)
    if len(values) != len(clients):
        raise ValueError(f"{what} has {len(values)} values for {len(clients)} clients")
    pairs = zip(clients, values, strict=True)
    return tuple(whole_bytes(v, f"{what} of client {name!r}") for name, v in pairs)
