"""What a federated method is to the loop that compares them, and what it is given to work on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Message:
    """What travels between server and client.

    Attributes:
        content: what the receiver gets.
        numbers: bytes of what the method's paper counts: seeds, scalars, coefficients, adapters.
        encoded: bytes as really sent; for a method without an encoding of its own, the numbers.
        loss: mean of the losses that a client saw: telemetry, it costs no bytes.
    """

    content: Any
    numbers: int
    encoded: int
    loss: float = float("nan")


def bare(content: Any, numbers: int, loss: float = float("nan")) -> Message:
    """Returns a message of numbers without a frame."""
    return Message(content, numbers, numbers, loss)


@dataclass(frozen=True)
class Work:
    """A federation's model and data, the same for every method.

    Clients share one replica of the model: between two calls of a method it holds the weights that
    the server's last round left.

    Attributes:
        model: in evaluation mode, all parameters trainable.
        loss: scalar loss of the model on a batch, as it is now; differentiable.
        batch: ``batch(client, round, step)``, a function of these alone; rounds count from 1.
        sizes: examples that each client trains on; its keys are the clients.
    """

    model: nn.Module
    loss: Callable[[Any], Tensor]
    batch: Callable[[str, int, int], Any]
    sizes: Mapping[str, int]

    @property
    def clients(self) -> Sequence[str]:
        """Names of the clients."""
        return list(self.sizes)


class Method(Protocol):
    """A federated method: a round is ``begin``, ``local`` of each client, ``aggregate``."""

    def begin(self, round_: int, clients: Sequence[str]) -> Mapping[str, Message]:
        """Returns the server's message to each client that takes part in the round (from 1)."""
        ...

    def local(self, client: str, round_: int, message: Message) -> Message:
        """Does a client's local work; returns its answer and leaves the replica as it was."""
        ...

    def aggregate(self, round_: int, replies: Mapping[str, Message]) -> None:
        """The server's step: puts the weights of the next round into the replica."""
        ...

    def state(self) -> Any:
        """Returns what ``restore`` continues from; for ``torch.save``."""
        ...

    def restore(self, state: Any) -> None:
        """Continues a run, on a replica of the original weights."""
        ...
