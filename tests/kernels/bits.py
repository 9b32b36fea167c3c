"""Comparison of exact bits, and passes over copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import zorba_kernels as zk

_WORD = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
DTYPES = tuple(_WORD)
Tensors = Mapping[str, Tensor]


def bits_of(tensor: Tensor) -> Tensor:
    """Returns the bits as integers of the same shape, every NaN as one pattern.

    Which NaN comes out is not part of the contract: processors differ in the payload they make.
    """
    plain = tensor.detach().contiguous()
    return torch.where(plain.isnan(), -1, plain.view(_WORD[plain.dtype]))


def assert_same_bits(actual: Tensor | Tensors, expected: Tensor | Tensors) -> None:
    """Fails, with the first difference, unless both tensors, or all of both dicts, are the same."""
    if isinstance(actual, Mapping):
        assert isinstance(expected, Mapping)
        assert actual.keys() == expected.keys()
        for name, tensor in actual.items():
            assert_same_bits(tensor, expected[name])
        return
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


def changed(
    tensors: Tensors, *args: Any, groups: Any = None, offsets: Any = None, **kwargs: Any
) -> dict[str, Tensor]:
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    zk.add_noise_(zk.ParamTable(copies, groups=groups, offsets=offsets), *args, **kwargs)
    return copies


def written(
    tensors: Tensors, *args: Any, groups: Any = None, offsets: Any = None, **kwargs: Any
) -> dict[str, Tensor]:
    """What a pass out of place writes, where there was no number; it must not change its source."""
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    out = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
    tables = (zk.ParamTable(some, groups=groups, offsets=offsets) for some in (tensors, out))
    zk.add_noise(*tables, *args, **kwargs)
    assert_same_bits(tensors, before)
    return out
