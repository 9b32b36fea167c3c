"""Entry: one parameter of a table, and which tensors are refused as one."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DTYPE_CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Supported weight dtypes and their code in ``csrc/noise.h``."""


class Identity(NamedTuple):
    """Where a tensor is, and what: two views with one identity are the same tensor."""

    address: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    device: torch.device


@dataclass(frozen=True)
class Entry:
    """One parameter of a table."""

    name: str
    source: Tensor  # as it was given
    tensor: Tensor  # the same storage without autograd
    stream: int  # uint64
    group: int  # row of coefs
    offset: int  # index of the tensor's first element in the whole parameter
    columns: int  # elements of a row of the whole parameter; 0: it has one dimension
    identity: Identity  # of the source, when the table was made

    @property
    def unchanged(self) -> bool:
        """Whether the source is still where, and what, it was when the table was made."""
        source, before = self.source, self.identity
        # Field by field, as no run of a program may go without it: a tuple would cost more.
        return (
            source.data_ptr() == before.address
            and source.dtype == before.dtype
            and source.shape == before.shape
            and source.stride() == before.stride
            and source.device == before.device
        )

    @property
    def likeness(self) -> tuple[Hashable, ...]:
        """What a tensor must share with this one to take its place in a pass."""
        place = self.group, self.offset, self.columns
        return self.name, self.tensor.shape, self.tensor.dtype, *place


def identity_of(tensor: Tensor) -> Identity:
    """Returns the identity of a tensor."""
    return Identity(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)


def columns_of(shape: Sequence[int]) -> int:
    """Returns the elements of a row of a parameter, all dimensions but the first; 0 without any."""
    return math.prod(shape[1:]) if len(shape) > 1 else 0


def refuse_duplicates(names: Iterable[str]) -> None:
    """Raises ValueError if a name occurs twice."""
    for name, times in Counter(names).items():
        if times > 1:
            raise ValueError(f"{name!r} is given twice (wrapper prefixes are left out)")


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raises TypeError or ValueError if a pass could not work on the tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name!r} is a {type(tensor).__name__}; a ParamTable holds tensors")
    if tensor.dtype not in DTYPE_CODES:
        supported = ", ".join(str(d) for d in DTYPE_CODES)
        raise TypeError(f"{name!r} has dtype {tensor.dtype}; supported are {supported}")
    # Sparse and nested tensors have no address that an index leads to.
    if tensor.layout != torch.strided:
        raise TypeError(f"{name!r} has layout {tensor.layout}; only strided tensors are supported")
    # From the smallest stride on, each dimension must step over all that is inside of it.
    reach = 0
    for stride, count in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if tensor.numel() and count > 1 and stride <= reach:
            raise ValueError(
                f"{name!r} is an expanded or overlapping view (shape {tuple(tensor.shape)}, "
                f"strides {tensor.stride()}): several of its elements may share one memory location"
            )
        reach += (count - 1) * stride


def non_negative(value: int, what: str) -> int:
    """Returns value, or raises ValueError unless it is an integer from 0."""
    # A bool is an int in Python, and here always a mistake (a mask taken for groups).
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{what} must be an integer from 0, got {value!r}")
    return value


def refuse_overlap(entries: Iterable[Entry]) -> None:
    """Raises ValueError if two tensors share memory.

    Views of one storage are fine while their memory ranges are disjoint. Strided views whose
    ranges interleave (the halves of ``x[:, ::2]``) are told apart by no cheap test, so they are
    refused too.
    """
    spans = []
    for entry in entries:
        t = entry.tensor
        if t.numel():
            # Up to the last element that the strides reach, not numel: views have gaps.
            reach = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
            end = t.data_ptr() + reach * t.element_size()
            spans.append((t.device, t.data_ptr(), end, entry.name))
    # Sorted by address, a span can only run into the next one.
    spans.sort(key=lambda s: (str(s[0]), s[1]))
    for before, after in itertools.pairwise(spans):
        if before[0] == after[0] and after[1] < before[2]:
            raise ValueError(
                f"{before[3]!r} and {after[3]!r} overlap in memory without being the same tensor"
            )
