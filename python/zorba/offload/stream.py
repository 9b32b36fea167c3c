"""Two buffers on the device through which the weights of idle blocks pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zorba.tables import padded_bytes, views_in

BUFFERS = 2  # one block computes while the next one arrives: more would only wait

Pairs = Sequence[tuple[Tensor, Tensor]]


class _HostCopies:
    """A thread that copies within the host, in the order in which copies were started."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="zorba-offload")

    def start(self, pairs: Pairs, freed: None) -> Future[None]:
        """Copies second to first of each pair, once ``freed`` is done; returns a ticket."""

        # By numpy: torch's copy_ would start threads that compete with those of the forward. It
        # lets go of the interpreter, also while a page of a mapped file comes from the disk.
        def copy() -> None:
            for target, source in pairs:
                np.copyto(bytes_of(target), bytes_of(source))

        return self._thread.submit(copy)

    def wait(self, ticket: Future[None], *, host: bool = False) -> None:
        """Lets what follows on the device, or the host itself, wait until the copy is done."""
        ticket.result()

    def freed(self) -> None:
        """Returns a mark behind all work of the device so far."""
        # None: whoever released a buffer is the one thread that computes, and done with it.


class _DeviceCopies:
    """The same by a stream of a GPU beside the one that computes; not run on a GPU yet."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, pairs: Pairs, freed: torch.cuda.Event | None) -> Any:
        with torch.cuda.stream(self._stream):
            # Kernels that read the buffer may still run: the host is ahead of the device.
            if freed is not None:
                self._stream.wait_event(freed)
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, ticket: torch.cuda.Event, *, host: bool = False) -> None:
        if host:
            ticket.synchronize()
        else:
            torch.cuda.current_stream(self._device).wait_event(ticket)

    def freed(self) -> Any:
        return torch.cuda.current_stream(self._device).record_event()


@dataclass
class _Buffer:
    """A piece of device memory, and the block whose weights are in it or on their way."""

    memory: Tensor
    block: str | None = None
    ticket: Any = None  # of the copy that brings it
    users: int = 0
    freed: Any = None  # mark behind the last use
    last_use: int = 0
    views: dict[str, Tensor] = field(default_factory=dict)  # the block's weights in the memory


class BlockStream:
    """Brings blocks to the device, each ahead of its use inside of ``streaming``.

    ``blocks`` are weights on the host by block and parameter, in the order of use; only read.
    """

    def __init__(self, device: torch.device, blocks: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._blocks = blocks
        self._order = list(blocks)
        # Each buffer is as large as the largest block, so that any block fits any of them.
        size = max((sum(map(padded_bytes, b.values())) for b in blocks.values()), default=0)
        count = min(BUFFERS, len(blocks))
        memory = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(count)]
        self._buffers = [_Buffer(piece) for piece in memory]
        self._copies: Any = _DeviceCopies(device) if device.type == "cuda" else _HostCopies()
        self._streaming = False
        self._uses = 0
        self.nbytes = count * size  # of the buffers

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Weights on the host do not change inside: they may be fetched ahead, and used again."""
        if self._streaming:  # nested, the outer one goes on: its end drops the buffers
            yield
            return
        self._streaming = True
        try:
            for name in self._order[: len(self._buffers)]:
                self._fetch(name)
            yield
        finally:
            self._streaming = False
            for buffer in self._buffers:
                # Ctrl-C may have come before a user released it.
                buffer.users = 0
                self._drop(buffer)

    @contextmanager
    def use(self, name: str) -> Iterator[dict[str, Tensor]]:
        """Gives the weights of a block on the device, for the length of the context."""
        buffer = self._fetch(name)
        self._copies.wait(buffer.ticket)
        self._uses += 1
        buffer.users += 1
        buffer.last_use = self._uses
        try:
            # The block behind this one in the model's order, where a buffer is free; a block that
            # runs out of turn is fetched when it is used.
            behind = self._order[self._order.index(name) + 1 :][:1] if self._streaming else []
            if behind and any(not buffer.users for buffer in self._buffers):
                self._fetch(behind[0])
            yield buffer.views
        finally:
            buffer.users -= 1
            if not buffer.users:
                buffer.freed = self._copies.freed()
                # Outside of ``streaming`` weights may change between two uses: fetch them again.
                if not self._streaming:
                    self._drop(buffer)

    def _fetch(self, name: str) -> _Buffer:
        """Returns the buffer that has the block, or will have it."""
        for buffer in self._buffers:
            if buffer.block == name:
                return buffer
        free = [buffer for buffer in self._buffers if not buffer.users]
        if not free:
            raise RuntimeError(
                f"block {name} is needed while {len(self._buffers)} other idle blocks run: blocks "
                "within blocks cannot be offloaded"
            )
        # The one that was used last holds the block that a nested or repeated forward wants again.
        buffer = min(free, key=lambda b: (b.block is not None, b.last_use))
        source = self._blocks[name]
        buffer.views = views_in(buffer.memory, source)
        pairs = [(buffer.views[p], source[p]) for p in source]
        buffer.ticket = self._copies.start(pairs, buffer.freed)
        buffer.block = name  # last: Ctrl-C before it leaves a buffer of no block
        return buffer

    def _drop(self, buffer: _Buffer) -> None:
        # The host waits: it may change the weights as soon as they count as not fetched.
        if buffer.ticket is not None:
            self._copies.wait(buffer.ticket, host=True)
        buffer.block = buffer.ticket = None


def bytes_of(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Returns the memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
