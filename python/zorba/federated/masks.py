"""Masks: which client activates which block."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zorba.federated.codec import check_name


class Masks:
    """Checked masks, a row of one array for each client.

    Args:
        names: of the clients.
        masks: bool [clients, blocks]; each client activates at least one block.
        num_blocks: of the model.

    Attributes:
        names: in the order given.
        rows: row of each client in ``array``, in the order of names.
        array: bool [clients, blocks].
        version: uint32 hash of names and masks.

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
        # A name is the client's place in the log's sums and on disk: two clients cannot share it.
        if len(set(names)) != len(names) or not names:
            raise ValueError("there must be clients, and their names must differ")
        self.names = tuple(check_name(name, "client name") for name in names)
        # A client without blocks would measure noise that is not there, and count as one of N.
        idle = np.flatnonzero(~array.any(axis=1))
        if len(idle):
            name = self.names[idle[0]]
            raise ValueError(f"client {name} activates no block: leave it out or give it one")
        # The order of names is the order of every sum over clients: it must not depend on how a
        # caller lists them.
        order = sorted(range(len(names)), key=self.names.__getitem__)
        self.rows = {self.names[at]: row for row, at in enumerate(order)}
        self.array: npt.NDArray[np.bool_] = array[order]
        # A hash, not a counter: a server that starts again knows no counter, and entries of the
        # same masks should have the same number.
        pairs = zip(self.rows, self.array, strict=True)
        text = b"".join(name.encode() + b"\0" + mask.tobytes() for name, mask in pairs)
        self.version = int.from_bytes(hashlib.sha256(text).digest()[:4], "little")

    def present(self, available: Iterable[str] | None) -> list[str]:
        """Returns the clients that are also in ``available`` (None: all), sorted."""
        wanted = self.rows.keys() if available is None else set(available)
        return [name for name in self.rows if name in wanted]

    def of(self, names: Iterable[str]) -> npt.NDArray[np.bool_]:
        """Returns the masks of these clients, bool [names, blocks]."""
        return self.array[[self.rows[name] for name in names]]
