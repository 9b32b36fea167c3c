"""What every benchmark gets: a device, sizes, calls timed in turn, a place for what it finds."""

from __future__ import annotations

import os
import random
import secrets
import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import pytest
import torch

from benchmarks import sizes
from benchmarks.timing import Call, Times, peak_bandwidth, time_in_turn

GPU_BACKENDS = ("cuda", "triton")
"""Both must serve an NVIDIA GPU."""
NOISE = 1.05
"""A pass that is this many times as fast as its limit was measured beside a disturbed one."""


def sizes_of(config: pytest.Config) -> sizes.Sizes:
    """Returns how much to do: on the GPU, where there is one and this is no rehearsal."""
    if config.getoption("rehearse", False):
        return sizes.REHEARSAL
    return sizes.GPU if torch.cuda.is_available() else sizes.CPU


class Bench:
    """One test's device and findings; its report carries these (``user_properties``).

    Attributes:
        facts: what belongs beside the outcome, such as the number of elements compared.
        measures: rows of tables: "group", "name" and figures, whose keys hold their unit.
        targets: figures beside what they should be. They decide nothing.
    """

    def __init__(self, item: pytest.Item) -> None:
        self.sizes = sizes_of(item.config)
        self.device = torch.device("cuda" if self.sizes is sizes.GPU else "cpu")
        # A copy on a CPU reads the memory that it writes to as well: there add_ is the limit.
        self.limit = "copy" if self.device.type == "cuda" else "plain"
        self._deadline = item.config.getoption("deadline", None) or time.monotonic() + 3600
        self.facts: dict[str, Any] = {}
        self.measures: list[dict[str, Any]] = []
        self.targets: list[dict[str, Any]] = []
        # The report of the test gets these same objects, so it has all that comes in later.
        found = ("facts", "measures", "targets")
        item.user_properties += [(name, getattr(self, name)) for name in found]

    @cached_property
    def backends(self) -> list[str]:
        """Backends to compare and measure on the device, the preferred one first."""
        import zorba_kernels as zk

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
        """Times calls in turn; skips the test, with the reason, where time is too short."""
        try:
            return time_in_turn(calls, self.device, self.sizes.runs, self.left())
        except TimeoutError as error:
            pytest.skip(f"left out: {error}")

    def measure(self, group: str, name: str, **figures: Any) -> None:
        """Adds a row to the table of a group."""
        self.measures.append({"group": group, "name": name, **figures})

    def target(
        self, name: str, figure: float, unit: str, *, least: float = 0.0, most: float = float("inf")
    ) -> None:
        """Adds a figure that should be at least, or at most, a bound."""
        bound = f"at least {least}" if least else f"at most {most}"
        row = {"name": name, "figure": figure, "unit": unit, "wanted": bound}
        self.targets.append({**row, "met": least <= figure <= most})

    def passes(self, group: str, times: Mapping[str, Times], weights: int, moved: int) -> None:
        """Adds passes over ``weights``, ``limit`` among them, that all move ``moved`` bytes."""
        peak = peak_bandwidth(self.device)
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
