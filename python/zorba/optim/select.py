"""Which parameters of a model are active, and in which group."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

import zorba_kernels as zk
from zorba.blocks import find_blocks
from zorba.offload import Offload
from zorba_kernels.noise import canonical_name

Blocks = str | Sequence[bool] | Tensor


def active_table(
    model: nn.Module, groups: dict[str, int] | None = None, num_groups: int | None = None
) -> zk.ParamTable:
    """Returns the table of a model's active parameters.

    Args:
        model: any module.
        groups: group of each active parameter by canonical name; None means all that require a
            gradient, in group 0.
        num_groups: rows that coefficients have.
    """
    named = _named(model)
    if groups is None:
        groups = {n: 0 for n, p in named.items() if p.requires_grad}
    missing = sorted(set(groups) - set(named))
    if missing:
        raise ValueError(f"the model has no parameters named {missing}")
    return zk.ParamTable({n: named[n] for n in groups}, groups=groups, num_groups=num_groups)


def active_parameters(model: nn.Module, blocks: Blocks = "all") -> dict[str, nn.Parameter]:
    """Returns the parameters to fine-tune, by canonical name: those that require a gradient.

    Args:
        model: any module.
        blocks: "all" for no other condition; "last:4" for the parameters of the last 4 transformer
            blocks; or a mask, one boolean a block in the order of ``zorba.hf.find_blocks``.

    Raises:
        ValueError: a mask of another length, a string that is neither, nothing left, or blocks that
            are off the device (``zorba.offload``).
    """
    wanted = {n: p for n, p in _named(model).items() if p.requires_grad}
    everything = isinstance(blocks, str) and blocks == "all"
    if not everything:
        found = find_blocks(model)
        mask = block_mask(blocks, len(found))
        inside = {n for block, on in zip(found, mask, strict=True) if on for n in block.parameters}
        wanted = {n: p for n, p in wanted.items() if n in inside}
    if not wanted:
        where = "" if everything else f" in blocks={blocks!r}"
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


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    named: dict[str, nn.Parameter] = {}
    for full_name, p in model.named_parameters():
        # Noise is keyed by this name: a wrapper (DDP, torch.compile) must not change the run.
        name = canonical_name(full_name)
        if name in named:
            raise ValueError(f"two parameters are called {name!r} once wrapper prefixes are off")
        named[name] = p
    return named
