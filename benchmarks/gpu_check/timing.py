"""Times of calls on a device, taken in turn, and what limits them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.sizes import Shapes

Call = Callable[[], object]
WARM_UP = 3
PEAK_BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12, "B200": 8.0e12}
"""Bytes a second, from the data sheets; the first name that is part of the device's."""


class Times(NamedTuple):
    """Of one call, in seconds."""

    median: float
    least: float
    most: float
    extra_bytes: int | None  # most that the call held beside what was there; CUDA only


def time_in_turn(
    calls: Mapping[str, Call], device: torch.device, runs: int, *, seconds: float
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
    extra = {name: extra_memory(call, device) for name, call in calls.items()}
    estimate = (time.perf_counter() - start) * runs
    if estimate > seconds:
        raise TimeoutError(f"{runs} runs of {len(calls)} calls would take {estimate:.0f} s")
    taken: dict[str, list[Stopwatch]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(runs):
            for name, call in calls.items():
                watch = Stopwatch(device)
                call()
                watch.stop()
                taken[name].append(watch)
        synchronize(device)
    finally:
        gc.enable()
    times = {}
    for name, watches in taken.items():
        each = [watch.seconds() for watch in watches]
        times[name] = Times(statistics.median(each), min(each), max(each), extra[name])
    return times


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
    """What a call costs the host: median of batches that the device is not waited for in."""
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


def extra_memory(call: Call, device: torch.device) -> int | None:
    """Bytes of device memory that a call holds at its peak, beside what was held before."""
    if device.type != "cuda":
        call()
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Gives memory that nothing holds back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_bandwidth(device: torch.device) -> float | None:
    """Bytes a second that the data sheet promises."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((rate for part, rate in PEAK_BANDWIDTH.items() if part in name), None)


def flat_weights(
    shapes: Shapes, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, dict[str, Tensor]]:
    """Random weights in one piece of memory, which one copy can move, and their views."""
    counts = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    flat = torch.empty(sum(counts.values()), dtype=dtype, device=device)
    for piece in flat.split(1 << 30):
        piece.normal_(0.0, 0.02)
    pieces = flat.split(list(counts.values()))
    return flat, {n: p.view(shapes[n]) for n, p in zip(counts, pieces, strict=True)}


def record_passes(
    report: Report,
    group: str,
    times: dict[str, Times],
    weights: int,
    moved: int,
    device: torch.device,
    copy: str = "copy",
) -> None:
    """Reports passes that move the same bytes, beside the copy of them and the data sheet."""
    peak = peak_bandwidth(device)
    for name, t in times.items():
        figures = {
            "ms": t.median * 1e3,
            "least_ms": t.least * 1e3,
            "most_ms": t.most * 1e3,
            "gb_per_s": moved / t.median / 1e9,
            "of_copy": times[copy].median / t.median,
            "ns_per_weight": t.median / weights * 1e9,
        }
        if peak is not None:
            figures["of_peak"] = moved / peak / t.median
        if t.extra_bytes is not None:
            figures["extra_mib"] = t.extra_bytes / 2**20
        report.measure(group, name, **figures)
