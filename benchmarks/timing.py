"""Times of calls on a device, taken in turn, and what bounds them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.allocations import peak_bytes
from benchmarks.sizes import Shapes

Call = Callable[[], object]
WARM_UP = 3
PEAK_BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12, "B200": 8.0e12}
"""Bytes a second, from the data sheets; the first name that is part of the device's."""


@dataclass(frozen=True)
class Times:
    """Seconds of a call, in the order of its runs.

    Attributes:
        each: of every run.
        extra_bytes: the most that the call held beside what was there; None on a CPU.
    """

    each: list[float]
    extra_bytes: int | None = None

    @property
    def median(self) -> float:
        """Of all runs."""
        return statistics.median(self.each)

    def over(self, other: Times) -> float:
        """Returns the median ratio to the call beside it: what drifts, drifts for both."""
        return statistics.median(a / b for a, b in zip(self.each, other.each, strict=True))


def time_in_turn(
    calls: Mapping[str, Call], device: torch.device, runs: int, seconds: float
) -> dict[str, Times]:
    """Times every call ``runs`` times, round robin, so that a change of clocks meets all alike.

    On a GPU with events, and nothing waits in between: the time is that of the device, unless the
    host falls behind. Tables must be much larger than the L2 cache for what they find to be cold.

    Raises:
        TimeoutError: the runs are estimated to take longer than ``seconds``.
    """
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    synchronize(device)
    start = time.perf_counter()
    for call in calls.values():
        call()
    synchronize(device)
    estimate = (time.perf_counter() - start) * runs
    if estimate > seconds:
        raise TimeoutError(f"{runs} runs of {len(calls)} calls would take {estimate:.0f} s")
    on_gpu = device.type == "cuda"
    extra = {name: peak_bytes(c, "cuda") if on_gpu else None for name, c in calls.items()}
    watches: dict[str, list[Stopwatch]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()  # a collection in the middle of a call would count as the call's time
    try:
        for _ in range(runs):
            for name, call in calls.items():
                watch = Stopwatch(device)
                call()
                watch.stop()
                watches[name].append(watch)
        synchronize(device)
    finally:
        gc.enable()
    return {name: Times([w.seconds() for w in some], extra[name]) for name, some in watches.items()}


class Stopwatch:
    """Between two points of a CUDA stream, or of the host's time."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        self._host = time.perf_counter()

    def stop(self) -> None:
        """Marks the end."""
        if self._events:
            self._events[1].record()
        self._host = time.perf_counter() - self._host

    def seconds(self) -> float:
        """Between start and stop; both must have happened on the device."""
        if self._events:
            return self._events[0].elapsed_time(self._events[1]) / 1e3
        return self._host


def host_seconds(call: Call, device: torch.device, calls: int) -> float:
    """Returns what a call costs the host: the median of batches, without waiting for the device."""
    batch = max(1, calls // 20)
    for _ in range(WARM_UP):
        call()
    each = []
    for _ in range(20):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(batch):
            call()
        each.append((time.perf_counter() - start) / batch)
    synchronize(device)
    return statistics.median(each)


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bandwidth(device: torch.device) -> float | None:
    """Returns the bytes a second that the data sheet promises, if the device has a known one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((rate for part, rate in PEAK_BANDWIDTH.items() if part in name), None)


def flat_weights(
    shapes: Shapes, device: torch.device, like: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns bf16 weights in one piece of memory, which one copy can move, and their views.

    Args:
        shapes: of the weights, by name.
        device: of the weights.
        like: flat weights to copy; random ones by default.
    """
    counts = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    flat = torch.empty(sum(counts.values()), dtype=torch.bfloat16, device=device)
    if like is not None:
        flat.copy_(like)
    else:
        for piece in flat.split(1 << 30):
            piece.normal_(0.0, 0.02)
    pieces = flat.split(list(counts.values()))
    return flat, {n: p.view(shapes[n]) for n, p in zip(counts, pieces, strict=True)}


def count_of(weights: int) -> str:
    """Returns a number of weights as people say it."""
    if weights < 1e6:
        return f"{weights:,}"
    return f"{weights / 1e9:.1f} B" if weights >= 1e9 else f"{weights / 1e6:.3g} M"
