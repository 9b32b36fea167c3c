"""What GPU backends keep in device memory: packed tables and programs, copied once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from zorba_kernels.noise import as_int64
from zorba_kernels.program import Program
from zorba_kernels.table import ParamTable

T = TypeVar("T")


@dataclass(frozen=True)
class DeviceTable:
    """A packed table in device memory."""

    segments: Tensor  # int64 [count, 7]
    ends: Tensor  # int64 [count], tiles up to and including each segment
    tiles: int
    made_on: torch.cuda.Stream | None  # None: host memory

    @classmethod
    def copy(cls, segments: Tensor, ends: Tensor, tiles: int, device: torch.device) -> DeviceTable:
        """Copies rows and ends from the CPU to the device, on its current stream."""
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        return cls(segments.to(device), ends.to(device), tiles, stream)

    def for_stream(self, stream: torch.cuda.Stream) -> None:
        """Keeps the memory from being used again before the stream is done with it."""
        if stream != self.made_on:
            self.segments.record_stream(stream)
            self.ends.record_stream(stream)


class OncePerPair(Generic[T]):
    """What is made once for a table and where its pass writes, kept as long as both are alive."""

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[ParamTable, WeakKeyDictionary[ParamTable, T]] = (
            WeakKeyDictionary()
        )

    def get(self, table: ParamTable, out: ParamTable, make: Callable[[], T]) -> T:
        """Returns what ``make`` made, at the first call with this pair."""
        by_out = self._made.setdefault(table, WeakKeyDictionary())
        if out not in by_out:
            by_out[out] = make()
        return by_out[out]


class HeldProgram:
    """A program whose seeds and coefficients live in device memory.

    Attributes:
        seeds: int64 [terms], bits of the uint64 seeds.
        samples: int64 [terms].
        coefs: float32 [groups, terms].
        decays: float32 [groups, rounds].
        round_ends: int64 [rounds].
        rounding_seeds: int64 [rounds], bits of the uint64 seeds.
    """

    def __init__(self, program: Program, device: torch.device) -> None:
        """Copies the program to the device, in one transfer that the host does not wait for."""
        terms, rounds = len(program.seeds), len(program.round_ends)
        self.distribution, self.rounding = program.distribution, program.rounding
        words = torch.tensor(
            [
                *map(as_int64, program.seeds),
                *program.samples,
                *program.round_ends,
                *map(as_int64, program.rounding_seeds),
            ],
            dtype=torch.int64,
        )
        floats = torch.cat([program.coefs.reshape(-1), program.decays.reshape(-1)])
        held = torch.cat([words.view(torch.uint8), floats.view(torch.uint8)])
        if device.type == "cuda":
            held = held.pin_memory().to(device, non_blocking=True)
        integers = held[: words.numel() * 8].view(torch.int64)
        reals = held[words.numel() * 8 :].view(torch.float32)
        self.seeds, self.samples, self.round_ends, self.rounding_seeds = torch.split(
            integers, [terms, terms, rounds, rounds]
        )
        self.coefs = reals[: program.coefs.numel()].view(program.coefs.shape)
        self.decays = reals[program.coefs.numel() :].view(program.decays.shape)
