"""What a federated method is to the loop that compares them, and what it is given to work on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Message:
    """What travels between server and client."""

    content: Any  # what the receiver gets
    numbers: int = 0  # bytes that the method's paper counts: seeds, scalars, adapters
    loss: float = float("nan")  # mean of the losses that a client saw: it costs no bytes
    frame: int = 0  # bytes around the numbers, of a method that has an encoding of its own

    @property
    def encoded(self) -> int:
        """Bytes as really sent."""
        return self.numbers + self.frame


@dataclass(frozen=True)
class Work:
    """A federation's model and data, the same for every method.

    Clients share one replica of the model: between two calls of a method it holds the weights that
    the server's last round left.
    """

    model: nn.Module  # in evaluation mode, all parameters trainable
    loss: Callable[[Any], Tensor]  # scalar loss of the model on a batch, as it is now
    batch: Callable[[str, int, int], Any]  # of client, round (from 1) and step alone
    sizes: Mapping[str, int]  # examples that each client trains on

    def shares(self, clients: Iterable[str]) -> dict[str, float]:
        """Returns the share of each of some clients in the examples of all of these."""
        sizes = {client: self.sizes[client] for client in clients}
        return {client: size / sum(sizes.values()) for client, size in sizes.items()}


class Method(Protocol):
    """A federated method: a round is ``begin``, ``local`` of each client, ``aggregate``."""

    def begin(self, round_: int, clients: Sequence[str]) -> Mapping[str, Message]:
        """Returns the server's message to each client that takes part in the round (from 1)."""

    def local(self, client: str, round_: int, message: Message) -> Message:
        """Does a client's local work; returns its answer and leaves the replica as it was."""

    def aggregate(self, round_: int, replies: Mapping[str, Message]) -> None:
        """The server's step: puts the weights of the next round into the replica."""
