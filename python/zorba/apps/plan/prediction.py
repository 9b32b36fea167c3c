"""Predicts what a client takes: for one mask as it will run, and for all as a planner needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zorba.apps.plan.calibration import Calibration
from zorba.apps.plan.footprint import Footprint
from zorba.apps.plan.workload import Workload
from zorba.planning.memory import MemoryModel

_BUFFERS = 2  # through which idle blocks pass


@dataclass(frozen=True)
class Parts:
    """Bytes of a client's peak.

    Attributes:
        weights: that stay on the device.
        buffers: through which idle blocks pass.
        scratch: of perturbed weights.
        activations: of a block, of evaluations that wait, and of logits.
        context: of process and libraries.
    """

    weights: int
    buffers: int
    scratch: int
    activations: int
    context: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.buffers + self.scratch + self.activations + self.context


def predict(
    footprint: Footprint, calibration: Calibration, workload: Workload, mask: Sequence[bool]
) -> Parts:
    """Predicts the peak of a client above what its imports take.

    Args:
        footprint: of the model, in the workload's dtype.
        calibration: of the machine, for this architecture and dtype.
        workload: what the client computes.
        mask: its active blocks, at least one.

    Raises:
        ValueError: the mask does not fit the model, or the dtypes differ.
    """
    if footprint.dtype != workload.dtype:
        raise ValueError(f"the footprint is of {footprint.dtype}, the workload {workload.dtype}")
    if len(mask) != len(footprint.blocks) or not any(mask):
        raise ValueError(
            f"the mask must have {len(footprint.blocks)} blocks, one of them active, got {mask!r}"
        )
    pairs = list(zip(footprint.blocks, footprint.padded, footprint.scratch, mask, strict=True))
    idle = [padded for _, padded, _, on in pairs if not on]
    if workload.idle == "resident" or not idle:
        workload = workload.resident()
        weights, buffers = footprint.total, 0
    else:
        weights = footprint.rest + sum(size for size, _, _, on in pairs if on)
        buffers = max(idle) * min(_BUFFERS, len(idle))
    return Parts(
        weights=weights,
        buffers=buffers,
        scratch=max(scratch for _, _, scratch, on in pairs if on),
        activations=calibration.of(workload).peak(workload),
        context=calibration.context,
    )


def memory_model(footprint: Footprint, calibration: Calibration, workload: Workload) -> MemoryModel:
    """Returns what ``plan_blocks`` plans with.

    Its sums are ``predict``'s, or above: buffers are those of the largest block, and scratch that
    of the largest module, whatever the mask.
    """
    whole = predict(footprint, calibration, workload, [True] * len(footprint.blocks))
    idle = [size if workload.idle == "resident" else 0 for size in footprint.blocks]
    fixed = whole.total - sum(footprint.blocks)
    if workload.idle == "offload":
        fixed += calibration.of(workload).peak(workload) - whole.activations
        fixed += max(footprint.padded) * min(_BUFFERS, len(footprint.padded))
    return MemoryModel(
        active=footprint.blocks,
        idle=idle,
        fixed=fixed,
        block_names=footprint.block_names,
        whole=whole.total,
    )
