"""Comparison of exact bits of large tensors on a device, a slice at a time."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor

from zorba_kernels.backends import reference

SLICE = 1 << 28  # elements: bounds the memory of a comparison
_WORDS = {2: torch.int16, 4: torch.int32}


def assert_equal_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Fails, saying where, unless two contiguous tensors of one device hold the same bits."""
    kinds = [(t.dtype, t.shape) for t in (actual, expected)]
    assert kinds[0] == kinds[1], f"{what}: {kinds[0]} is compared with {kinds[1]}"
    words = [t.reshape(-1).view(_WORDS[t.element_size()]) for t in (actual, expected)]
    for start in range(0, actual.numel(), SLICE):
        mine, theirs = (w[start : start + SLICE] for w in words)
        if not torch.equal(mine, theirs):
            at = start + int((mine != theirs).nonzero()[0])
            values = [t.reshape(-1)[at].item() for t in (actual, expected)]
            bits = [hex(int(w[at]) & (1 << 8 * w.element_size()) - 1) for w in words]
            raise AssertionError(
                f"{what}: element {at} is {values[0]!r} ({bits[0]}) and should be {values[1]!r} "
                f"({bits[1]}); {int((mine != theirs).sum())} differ from there on"
            )


def reference_chunk(elements: int) -> mock._patch[int]:
    """Lets the oracle work on more at a time: a GPU has the memory, and launches cost."""
    return mock.patch.object(reference, "CHUNK", elements)
