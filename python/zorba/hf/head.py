"""Computes only the logits that are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zorba.blocks import name_of
from zorba.forward import replaced_forward


class HeadError(ValueError):
    """A model whose output embedding cannot be narrowed."""


@torch.no_grad()
def check_head(model: nn.Module, ids: list[int], causal: bool) -> None:
    """Raises HeadError where narrowed logits of two tokens are not the model's own.

    A model may only change each logit by itself behind the output embedding (a scale, a softcap),
    and positions of a causal model must not see later ones.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise HeadError(
            f"{name_of(model)} is an encoder-decoder, whose decoder has a prompt of its own: take "
            "a causal or a masked language model, or its full logits"
        )
    # Dropout would make two forwards differ. Modules may be in different modes: each is put back.
    modes = [(module, module.training) for module in model.modules()]
    weight = next(model.parameters())
    both = torch.tensor([ids[:2]], device=weight.device)
    first = torch.zeros_like(both[0, :1])
    try:
        model.eval()
        options = {"use_cache": False} if causal else {}
        mine = narrow_logits(model, {"input_ids": both, **options}, first, first, both[0])[0]
        # The whole forward of a causal model gets the first token alone: if its logits are others
        # with the second one behind it, positions see what follows them.
        whole = model(input_ids=both[:, :1] if causal else both).logits[0, -1 if causal else -2]
    except (IndexError, RuntimeError, TypeError) as error:
        raise HeadError(
            f"{name_of(model)} does not run when only those logits that are read are computed: "
            f"{error}. Use its full logits instead"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode
    wanted = whole[both[0]].float()
    # Products of other shapes add in another order: about 1e-6 relative in float32, 1e-2 in 16
    # bits. A factor or an offset on the logits that is missed is far larger.
    limit = (1e-3 if weight.dtype == torch.float32 else 3e-2) * (1.0 + float(wanted.abs().max()))
    off = float((mine - wanted).abs().max())
    if not off <= limit:
        raise HeadError(
            f"{name_of(model)} gives other logits (by {off:.2g}) when only those that are read are "
            f"computed{', or its positions see later ones' if causal else ''}. Use its full "
            "logits instead"
        )


def narrow_logits(
    model: nn.Module,
    inputs: Mapping[str, Any],
    rows: Tensor,
    positions: Tensor,
    columns: Tensor | None = None,
) -> Tensor:
    """Runs a language model whose head sees some positions, and of the vocabulary some columns.

    The model's own forward runs with its output embedding narrowed. So whatever it does with the
    logits behind that (a scale, a softcap) is done here too, and a placement still finds that the
    head's weights are read in the forward of the head.

    ``inputs`` are what the model is called with, ``input_ids`` among them. ``rows`` and
    ``positions``, int64 [n], say where the n logit vectors are read, and ``columns``, int64 [m], of
    which tokens; None for all. Returns float32 [n, m]. HeadError: the model has no output
    embedding, or does not call it.
    """
    find: Any = getattr(model, "get_output_embeddings", None)
    head: Any = find() if find is not None else None
    if head is None:
        raise HeadError(f"{name_of(model)} has no output embedding: is it a language model?")
    # One narrowed forward for all that run side by side: whoever comes last takes it off.
    there = vars(head).get("forward")
    narrow = there if isinstance(there, _Narrow) else _Narrow(head)
    reads = _Reads(inputs["input_ids"].shape[1], rows, positions, columns)
    narrow.users += 1
    token = _reads.set(reads)
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        _reads.reset(token)
        narrow.users -= 1
        if not narrow.users:
            narrow.replaced.close()
    if reads.calls != 1:
        raise HeadError(
            f"{name_of(model)} called its output embedding {reads.calls} times in a forward, not "
            "once"
        )
    return logits.flatten(0, -2).float().to(rows.device)


@dataclass
class _Reads:
    """Which logits a forward reads."""

    length: int  # of the sequences
    rows: Tensor
    positions: Tensor
    columns: Tensor | None
    calls: int = 0  # of the head


# Of the forward that runs now. Forwards that run side by side (``zorba.optim.evaluation``: each is
# a greenlet, which has a context of its own) go through one head and each read their own.
_reads: ContextVar[_Reads | None] = ContextVar("reads", default=None)


class _Narrow:
    """Takes the place of a head's forward as long as some forward reads less than all of it."""

    def __init__(self, head: Any) -> None:
        self.users = 0
        # A head of another class, or one that accelerate placed on a device of its own and gave a
        # forward of its own, may do more than multiply.
        self._plain = type(head) is nn.Linear and "forward" not in vars(head)
        self._head = head
        self._whole: Callable[[Tensor], Tensor] = head.forward
        self.replaced = ExitStack()
        self.replaced.enter_context(replaced_forward(head, self))

    def __call__(self, hidden: Tensor) -> Tensor:
        reads = _reads.get()
        if reads is None:
            return self._whole(hidden)
        reads.calls += 1
        # On the head's device, which accelerate may have chosen: not that of the ids.
        ahead = hidden.shape[1] - reads.length  # virtual tokens of a soft prompt
        at = (reads.rows.to(hidden.device), reads.positions.to(hidden.device) + ahead)
        read, columns = hidden[at][None], reads.columns  # read: [1, n, width]
        if columns is None or not self._plain:
            logits = self._whole(read)
            return logits if columns is None else logits[..., columns.to(logits.device)]
        # A few rows of the vocabulary's: a copy of them is small, the whole product is not.
        weight, bias = self._head.weight[columns], self._head.bias
        return nn.functional.linear(read, weight, None if bias is None else bias[columns])
