"""Masks: which client activates which block."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zorba.federated.codec import check_name


class Masks:
    """Checked masks by client.

    Args:
        names: of the clients.
        masks: bool [clients, blocks]; each client activates at least one block.
        num_blocks: of the model.

    Attributes:
        rows: mask of each client, bool [blocks], in the order given.
        version: uint32 hash of names and masks: the same masks have the same version after a
            restart.

    Raises:
        ValueError: shapes or names do not fit.
    """

    def __init__(self, names: Sequence[str], masks: Any, num_blocks: int) -> None:
        array = np.asarray(masks)
        if array.dtype != np.bool_ or array.shape != (len(names), num_blocks):
            raise ValueError(
                f"masks must be bool [{len(names)}, {num_blocks}] (clients, blocks), got "
                f"{array.dtype} {list(array.shape)}"
            )
        if len(set(names)) != len(names) or not names:
            raise ValueError("there must be clients, and their names must differ")
        self.rows: dict[str, npt.NDArray[np.bool_]] = {}
        for name, row in zip(names, array, strict=True):
            if not row.any():
                raise ValueError(f"client {name} activates no block: leave it out or give it one")
            self.rows[check_name(name, "client name")] = row.copy()
        text = b"".join(n.encode() + b"\0" + self.rows[n].tobytes() for n in sorted(names))
        self.version = int.from_bytes(hashlib.sha256(text).digest()[:4], "little")

    def present(self, available: Iterable[str] | None) -> list[str]:
        """Returns the clients that are also in ``available`` (None: all), sorted."""
        there = self.rows.keys() if available is None else self.rows.keys() & set(available)
        return sorted(there)
