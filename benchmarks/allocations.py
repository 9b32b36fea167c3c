"""Counts what torch's allocators hold while a call runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """Returns the most bytes held at a time during the call, above those before it.

    On the CPU from the profiler's record of every allocation; on a GPU from the caching allocator's
    own count. The call is made once beforehand, so that what it keeps for good is not counted.
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
