"""By what files and messages know a model again, and which package wrote them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

import zorba_kernels as zk


def model_fingerprint(parameters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> int:
    """Returns the uint64 fingerprint of all parameters, whatever devices they are on.

    Args:
        parameters: for example ``model.named_parameters()``; only read.
    """
    pairs = parameters.items() if isinstance(parameters, Mapping) else parameters
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in pairs:
        by_device.setdefault(tensor.device, []).append((name, tensor))
    # A fingerprint is a sum over weights, so those of the devices add up.
    return sum(zk.fingerprint(zk.ParamTable(part)) for part in by_device.values()) % (1 << 64)


def package_version() -> str:
    """Returns the version of the installed package."""
    try:
        return version("zorba-kernels")
    except PackageNotFoundError:
        return "unknown"
