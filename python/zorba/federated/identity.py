"""ModelIdentity: by what server and clients know that they speak of the same model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

from zorba.tables import Tables, fingerprint

MAX_BLOCKS = 65534
"""Blocks of a model; 65535 marks an uncovered block in wide log entries."""


@dataclass(frozen=True)
class ModelIdentity:
    """A model at theta_0, told in a few numbers.

    Attributes:
        origin: fingerprint of all parameters, frozen ones too.
        start: fingerprint of the trainable parameters.
        layout: hash of the trainable parameters' names, shapes, dtypes and blocks.
        num_weights: how many weights are trainable.
        num_blocks: how many blocks they are in.
    """

    origin: int
    start: int
    layout: int
    num_weights: int
    num_blocks: int

    def difference(self, other: ModelIdentity) -> str | None:
        """Returns a sentence on the first thing in which ``other`` differs, or None."""
        for field in reversed(fields(self)):  # from the plainest to the subtlest
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                shown = (f"{theirs:#018x}", f"{mine:#018x}") if mine >> 32 else (theirs, mine)
                return f"{_MEANING[field.name]} {shown[0]}, expected {shown[1]}"
        return None


_MEANING = {
    "origin": "another model: the fingerprint of all parameters before round 1 is",
    "start": "another model: the fingerprint of the trainable parameters before round 1 is",
    "layout": "other names, shapes, dtypes or blocks of trainable parameters: their hash is",
    "num_weights": "another number of trainable weights:",
    "num_blocks": "another number of blocks:",
}


def identity_of(table: Tables, origin: int) -> ModelIdentity:
    """Returns the identity of a model whose trainable parameters are in the table, at theta_0."""
    if table.num_groups > MAX_BLOCKS:
        raise ValueError(
            f"the table has {table.num_groups} blocks; at most {MAX_BLOCKS} are served"
        )
    lines = [
        f"{e.name}\0{tuple(e.tensor.shape)}\0{e.tensor.dtype}\0{e.group}\0{e.offset}"
        for e in sorted(table.entries, key=lambda e: e.name)
    ]
    digest = hashlib.sha256("\n".join(lines).encode()).digest()
    return ModelIdentity(
        origin=origin,
        start=fingerprint(table),
        layout=int.from_bytes(digest[:8], "little"),
        num_weights=table.numel,
        num_blocks=table.num_groups,
    )
