"""What every benchmark gets: a device, sizes, calls timed in turn, a place for what it finds."""

from __future__ import annotations

import gc
import os
import random
import secrets
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import zorba_kernels as zk
from benchmarks import sizes
from zorba_kernels.backends import reference

GPU_BACKENDS = ("cuda", "triton")  # both must serve an NVIDIA GPU
NOISE = 1.05  # a pass that many times as fast as its limit was measured beside a disturbed one
Call = Callable[[], object]
Mark = torch.cuda.Event | float
WARM_UP = 3
# Bytes a second, from the data sheets, by a part of the device's name.
PEAK_BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12, "B200": 8.0e12}


@dataclass(frozen=True)
class Times:
    """Seconds of a call, in the order of its runs."""

    each: list[float]
    extra_bytes: int | None = None  # most that the call held beside what was there; None on a CPU

    @property
    def median(self) -> float:
        return statistics.median(self.each)

    def over(self, other: Times) -> float:
        """Returns the median ratio to the call beside it: what drifts, drifts for both."""
        return statistics.median(a / b for a, b in zip(self.each, other.each, strict=True))


def sizes_of(config: pytest.Config) -> sizes.Sizes:
    """Returns how much to do: on the GPU, where there is one and this is no rehearsal."""
    if config.getoption("rehearse", False):
        return sizes.REHEARSAL
    return sizes.GPU if torch.cuda.is_available() else sizes.CPU


class Bench:
    """One test's device and findings; its report carries these (``user_properties``)."""

    def __init__(self, item: pytest.Item) -> None:
        self.sizes = sizes_of(item.config)
        self.device = torch.device("cuda" if self.sizes is sizes.GPU else "cpu")
        # A copy on a CPU reads the memory that it writes to as well: there add_ is the limit.
        self.limit = "copy" if self.device.type == "cuda" else "plain"
        self._deadline = item.config.getoption("deadline", None) or time.monotonic() + 3600
        self.facts: dict[str, Any] = {}  # beside the outcome, such as the elements compared
        self.measures: list[dict[str, Any]] = []  # rows of tables; keys of figures hold their unit
        self.targets: list[dict[str, Any]] = []  # figures beside what they should be
        # The report of the test gets these same objects, so it has all that comes in later.
        found = ("facts", "measures", "targets")
        item.user_properties += [(name, getattr(self, name)) for name in found]

    @cached_property
    def backends(self) -> list[str]:
        """Backends to compare and measure on the device, the preferred one first."""
        wanted = GPU_BACKENDS if self.device.type == "cuda" else ("cpu",)
        serving = {row.name for row in zk.backends(self.device) if row.available}
        return [name for name in wanted if name in serving]

    @cached_property
    def rng(self) -> random.Random:
        """Inputs that differ every run; ``ZORBA_TEST_SEED`` repeats them."""
        self.facts["seed"] = int(os.environ.get("ZORBA_TEST_SEED") or secrets.randbits(32))
        return random.Random(self.facts["seed"])

    def left(self) -> float:
        """Returns the seconds until this process should be through."""
        return self._deadline - time.monotonic()

    def in_turn(self, calls: Mapping[str, Call]) -> dict[str, Times]:
        """Times every call, round robin, so that a change of clocks meets all alike.

        On a GPU with events, and nothing waits in between: the time is that of the device, unless
        the host falls behind. Skips the test, with the reason, where time is too short.
        """
        for call in calls.values():
            for _ in range(WARM_UP):
                call()
        synchronize(self.device)
        start = time.perf_counter()
        for call in calls.values():
            call()
        synchronize(self.device)
        estimate = (time.perf_counter() - start) * self.sizes.runs
        if estimate > self.left():
            said = f"{self.sizes.runs} runs of {len(calls)} calls would take {estimate:.0f} s"
            pytest.skip(f"left out: {said}")
        on_gpu = self.device.type == "cuda"
        extra = {name: peak_bytes(c, "cuda") if on_gpu else None for name, c in calls.items()}
        marks: dict[str, list[tuple[Mark, Mark]]] = {name: [] for name in calls}
        gc.collect()
        gc.disable()  # a collection in the middle of a call would count as the call's time
        try:
            for _ in range(self.sizes.runs):
                for name, call in calls.items():
                    begin = mark(self.device)
                    call()
                    marks[name].append((begin, mark(self.device)))
            synchronize(self.device)
        finally:
            gc.enable()
        return {n: Times([between(*m) for m in some], extra[n]) for n, some in marks.items()}

    def measure(self, group: str, name: str, **figures: Any) -> None:
        self.measures.append({"group": group, "name": name, **figures})

    def target(
        self, name: str, figure: float, unit: str, *, least: float = 0.0, most: float = float("inf")
    ) -> None:
        """Adds a figure that should be at least, or at most, a bound."""
        bound = f"at least {least}" if least else f"at most {most}"
        met = least <= figure <= most
        row = {"name": name, "figure": figure, "unit": unit, "wanted": bound, "met": met}
        self.targets.append(row)

    def passes(self, group: str, times: Mapping[str, Times], weights: int, moved: int) -> None:
        card = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        peak = next((rate for part, rate in PEAK_BANDWIDTH.items() if part in card), None)
        for name, t in times.items():
            share = times[self.limit].median / t.median
            figures: dict[str, Any] = {
                "ms": t.median * 1e3,
                "gb_per_s": moved / t.median / 1e9,
                "ns_per_weight": t.median / weights * 1e9,
                "of_limit": share if share <= NOISE else "noise",
            }
            if peak is not None:
                figures["of_peak"] = moved / peak / t.median
            if t.extra_bytes is not None:
                figures["extra_mib"] = t.extra_bytes / 2**20
            self.measure(f"{group}; limit: {self.limit}", name, **figures)


# --- Times -------------------------------------------------------------------------------------


def mark(device: torch.device) -> Mark:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(begin: Mark, end: Mark) -> float:
    return end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1e3


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
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- Memory --------------------------------------------------------------------------------------


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """Returns the most bytes of torch held at a time during the call, above those before it.

    On the CPU from the profiler's record of every allocation. The call is made once beforehand, so
    that what it keeps for good is not counted.
    """
    call()
    if device != "cpu":
        # torch works behind the host: what is still running belongs to neither figure.
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    # Every allocation and release, in order: the profiler's tables only have totals by operation.
    results: Any = record.profiler
    events = sorted(results.kineto_results.events(), key=lambda event: event.start_ns())
    sizes = [int(event.nbytes()) for event in events if event.name() == "[memory]"]
    if not sizes:
        raise RuntimeError("the profiler saw no allocation: its record of memory is not reliable")
    # Sizes of releases are negative. The peak is not the sum: what is freed may be used again.
    held = most = 0
    for size in sizes:
        held += size
        most = max(most, held)
    return most


# --- Exact bits --------------------------------------------------------------------------------

SLICE = 1 << 28  # elements: bounds the memory of a comparison
_WORDS = {2: torch.int16, 4: torch.int32}


def assert_equal_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Fails, saying where, unless two contiguous tensors of one device hold the same bits."""
    kinds = [(t.dtype, t.shape) for t in (actual, expected)]
    assert kinds[0] == kinds[1], f"{what}: {kinds[0]} is compared with {kinds[1]}"
    words = [t.reshape(-1).view(_WORDS[t.element_size()]) for t in (actual, expected)]
    for start in range(0, actual.numel(), SLICE):
        mine, theirs = (w[start : start + SLICE] for w in words)
        if not torch.equal(mine, theirs):
            at = start + int((mine != theirs).nonzero()[0])
            values = [t.reshape(-1)[at].item() for t in (actual, expected)]
            bits = [hex(int(w[at]) & (1 << 8 * w.element_size()) - 1) for w in words]
            raise AssertionError(
                f"{what}: element {at} is {values[0]!r} ({bits[0]}) and should be {values[1]!r} "
                f"({bits[1]}); {int((mine != theirs).sum())} differ from there on"
            )


def reference_chunk(elements: int) -> mock._patch[int]:
    """Lets the oracle work on more at a time: a GPU has the memory, and launches cost."""
    return mock.patch.object(reference, "CHUNK", elements)
