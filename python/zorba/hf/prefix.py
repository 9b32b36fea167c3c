"""Stops a causal language model in front of a block, and goes on from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from zorba.forward import replaced_forward
from zorba.optim.own import repeated


@dataclass(frozen=True)
class Prefix:
    """A batch in front of a block. The same for every perturbation of that block and later ones."""

    hidden: Tensor  # [batch, positions, width], what enters the block, padded on the right
    kwargs: dict[str, Any]  # the other arguments that the model hands to each of its blocks
    last: Tensor  # int64 [batch], index of each row's last real position
    labels: Tensor  # int64 [batch]

    def repeat(self, times: int) -> Prefix:
        """Returns the batch several times, one behind the other."""
        return Prefix(**repeated(vars(self), times))


# The model's own forward makes masks and positions in front of its blocks, of every architecture in
# another way, and has no exit there.
class _StopError(Exception):
    """Leaves a model's forward as soon as the wanted block is reached."""


@torch.no_grad()
def run_prefix(
    model: nn.Module, block: nn.Module, rows: Sequence[Sequence[int]], labels: Sequence[int]
) -> Prefix:
    """Runs a causal model up to the entrance of one block.

    Rows, the token ids of each sequence, are padded on the right and no attention mask is passed:
    positions of a causal model never see what stands behind them, so real positions come out as
    they do without padding. ValueError: the model never reaches the block, or calls its blocks with
    different arguments.
    """
    # Such models make a mask for each type of layer, and the arguments caught are of one of them.
    kinds = set(getattr(getattr(model, "config", None), "layer_types", None) or [])
    if len(kinds) > 1:
        raise ValueError(
            f"{type(model).__name__} has layers of several types ({', '.join(sorted(kinds))}) and "
            "gives each its own arguments; a prefix is for models whose blocks are called alike"
        )
    device = next(model.parameters()).device
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
    last = torch.tensor([len(row) - 1 for row in rows], device=device)

    def stop(*args: Any, **kwargs: Any) -> None:
        raise _StopError(args[0] if args else kwargs.pop("hidden_states"), kwargs)

    try:
        with replaced_forward(block, stop):
            model(input_ids=ids, use_cache=False)
    except _StopError as stopped:
        hidden, kwargs = stopped.args
        # A copy: a buffer of the model's may be behind it, which the next forward writes.
        return Prefix(hidden.clone(), kwargs, last, torch.tensor(labels, device=device))
    raise ValueError("the forward of the model never reached the block")


@torch.no_grad()
def extend_prefix(prefix: Prefix, blocks: Sequence[nn.Module]) -> Prefix:
    """Returns the prefix behind some more blocks."""
    return replace(prefix, hidden=_run(prefix, blocks))


def run_suffix(
    prefix: Prefix, blocks: Sequence[nn.Module], norm: nn.Module, head: Tensor
) -> Tensor:
    """Runs the blocks behind a prefix, the model's final norm and some rows of its head.

    ``head`` is [answers, width]. Returns float32 [batch, answers], at each row's last position.
    """
    hidden = _run(prefix, blocks)
    # One position a row and a few rows of the head: the vocabulary is most of a small model's work.
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return nn.functional.linear(norm(hidden[rows, prefix.last]), head).float()


def _run(prefix: Prefix, blocks: Sequence[nn.Module]) -> Tensor:
    hidden = prefix.hidden
    for block in blocks:
        out = block(hidden, **prefix.kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
    return hidden
