"""By what files and messages know a model again, and which package wrote them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from torch import Tensor

from zorba.tables import DeviceTables, fingerprint


def model_fingerprint(parameters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> int:
    """Returns the uint64 fingerprint of all parameters, whatever devices they are on.

    Args:
        parameters: for example ``model.named_parameters()``; only read.
    """
    named = dict(parameters.items() if isinstance(parameters, Mapping) else parameters)
    return fingerprint(DeviceTables(named, dict.fromkeys(named, 0)))


@cache
def package_version() -> str:
    """Returns the version of the installed package."""
    try:
        return version("zorba-kernels")
    except PackageNotFoundError:
        return "unknown"
