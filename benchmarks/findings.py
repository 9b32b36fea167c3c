"""What a benchmark or check found: kept with the outcome of its test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from benchmarks.timing import Times, peak_bandwidth

NOISE = 1.05
"""A pass that is this many times as fast as its limit was measured beside a disturbed one."""


class Findings:
    """Facts, measures and targets of one test; its report carries them (``user_properties``).

    Attributes:
        facts: what belongs beside the outcome, such as the number of elements compared.
        measures: rows of tables: "group", "name" and figures, whose keys hold their unit.
        targets: figures beside what they should be. They decide nothing.
    """

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.facts: dict[str, Any] = {}
        self.measures: list[dict[str, Any]] = []
        self.targets: list[dict[str, Any]] = []
        # The report of the test gets these same objects, so it has all that comes in later.
        request.node.user_properties += vars(self).items()

    def measure(self, group: str, name: str, **figures: Any) -> None:
        """Adds a row to the table of a group."""
        self.measures.append({"group": group, "name": name, **figures})

    def target(
        self, name: str, figure: float, unit: str, *, least: float | None = None, most: float = 0.0
    ) -> None:
        """Adds a figure that should be at least, or else at most, a bound."""
        met = figure >= least if least is not None else figure <= most
        bound = f"at least {least}" if least is not None else f"at most {most}"
        row = {"name": name, "figure": figure, "unit": unit, "wanted": bound, "met": met}
        self.targets.append(row)

    def passes(
        self,
        group: str,
        times: Mapping[str, Times],
        weights: int,
        moved: int,
        limit: str,
        device: torch.device,
    ) -> None:
        """Adds passes that move the same bytes, beside the one that nothing can be faster than.

        Args:
            group: of the rows.
            times: of the passes.
            weights: number that each goes over.
            moved: bytes that each reads and writes.
            limit: name of the pass that only moves bytes.
            device: of the weights.
        """
        peak = peak_bandwidth(device)
        for name, t in times.items():
            share = times[limit].median / t.median
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
            self.measure(group, name, **figures, least_ms=min(t.each) * 1e3)
