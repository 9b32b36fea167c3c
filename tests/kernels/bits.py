"""Comparison of exact bits."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits_of(tensor: Tensor) -> Tensor:
    """Returns the bits as integers of the same shape, every NaN as one pattern.

    Which NaN comes out is not part of the contract: processors differ in the payload they make.
    """
    plain = tensor.detach().contiguous()
    return torch.where(plain.isnan(), -1, plain.view(_WORD[plain.dtype]))


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Fails, with the first difference, unless both tensors hold the same bits."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if torch.equal(bits_of(actual), bits_of(expected)):
        return
    differs = (bits_of(actual) != bits_of(expected)).reshape(-1)
    at = int(differs.nonzero()[0])
    raise AssertionError(
        f"{int(differs.sum())} of {differs.numel()} elements differ; the first, at {at}, is "
        f"{actual.reshape(-1)[at].item()!r} and should be {expected.reshape(-1)[at].item()!r}"
    )
