"""Comparison of exact bits of large tensors, a slice at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.kernels.bits import assert_same_bits

SLICE = 1 << 28  # elements: bounds the memory of a comparison
_WORDS = {2: torch.int16, 4: torch.int32}


def assert_equal_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Fails, saying where, unless two contiguous tensors of one device hold the same bits."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        raise AssertionError(
            f"{what}: {actual.dtype} {tuple(actual.shape)} is compared with {expected.dtype} "
            f"{tuple(expected.shape)}"
        )
    flat = [t.reshape(-1) for t in (actual, expected)]
    words = [t.view(_WORDS[t.element_size()]) for t in flat]
    for start in range(0, actual.numel(), SLICE):
        mine, theirs = (w[start : start + SLICE] for w in words)
        if torch.equal(mine, theirs):
            continue
        at = start + int((mine != theirs).nonzero()[0])
        try:
            assert_same_bits(*(t[at : at + SLICE // 256] for t in flat))
        except AssertionError as error:
            raise AssertionError(f"{what}, from element {at} on: {error}") from None
        raise AssertionError(f"{what}: element {at} differs in the payload of a NaN")
