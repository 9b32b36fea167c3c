"""How files and messages recognise a model, and which package wrote them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from torch import Tensor, nn

from zorba.tables import DeviceTables, TableLike, each_table, fingerprint
from zorba_kernels.table import DTYPE_CODES

MAX_BLOCKS = 65534  # of a model; 65535 marks an uncovered block in log entries

# From the plainest to the subtlest: the first that differs tells most.
_MEANING = {
    "num_blocks": "another number of blocks:",
    "num_weights": "another number of trainable weights:",
    "layout": "other names, shapes, dtypes or blocks of trainable parameters: their hash is",
    "start": "another model: the fingerprint of the trainable parameters before round 1 is",
    "origin": "another model: the fingerprint of all parameters before round 1 is",
}


@dataclass(frozen=True)
class ModelIdentity:
    """A model before its first update, in a few numbers."""

    origin: int | None  # fingerprint of all parameters, frozen ones too; None where not known
    start: int  # fingerprint of the trainable parameters
    layout: int  # hash of the trainable parameters' names, shapes, dtypes and blocks
    num_weights: int  # how many weights are trainable
    num_blocks: int  # how many blocks (groups of coefficients) they are in

    def difference(self, other: ModelIdentity) -> str | None:
        """Returns a sentence on the first thing in which ``other`` differs, or None."""
        for name, meaning in _MEANING.items():
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                shown = [f"{n:#018x}" if n is not None and n >> 32 else n for n in (theirs, mine)]
                return f"{meaning} {shown[0]}, expected {shown[1]}"
        return None


def identity_of(tables: TableLike, origin: int | None) -> ModelIdentity:
    """Returns the identity of a model whose trainable parameters are in the tables.

    ``origin`` is the ``model_fingerprint`` of all parameters, or None; nothing was updated yet.
    """
    parts = each_table(tables)
    groups = {table.num_groups for table in parts}
    if len(groups) != 1 or max(groups) > MAX_BLOCKS:
        told = f"the tables have {sorted(groups)} blocks"
        raise ValueError(f"{told}; expected one number, at most {MAX_BLOCKS}")
    weights = sum(table.numel for table in parts)
    return ModelIdentity(origin, fingerprint(tables), layout_of(tables), weights, groups.pop())


def layout_of(tables: TableLike) -> int:
    """Returns the uint64 hash of the parameters' names, shapes, dtypes, groups and offsets."""
    # Sorted by name: the order in which a model lists its parameters does not matter.
    entries = sorted((e for t in each_table(tables) for e in t.entries), key=lambda e: e.name)
    lines = [
        f"{e.name}\0{tuple(e.tensor.shape)}\0{e.tensor.dtype}\0{e.group}\0{e.offset}"
        for e in entries
    ]
    digest = hashlib.sha256("\n".join(lines).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def model_fingerprint(parameters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> int:
    """Returns the uint64 fingerprint of ``model.named_parameters()``, whatever their devices."""
    named = dict(parameters)
    return fingerprint(DeviceTables(named, dict.fromkeys(named, 0)))


def recordable(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters that have a fingerprint: those of quantised dtypes have none."""
    return {name: p for name, p in model.named_parameters() if p.dtype in DTYPE_CODES}


@cache
def package_version() -> str:
    """Returns the version of the installed package."""
    try:
        return version("zorba-kernels")
    except PackageNotFoundError:
        return "unknown"
