"""What a client measures that holds a whole model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import zorba_kernels as zk
from zorba.offload import Offload
from zorba.optim.evaluation import Evaluator
from zorba.optim.fused import FusedPlacement, unfusable
from zorba.optim.own import BothSigns
from zorba.optim.placement import Placement
from zorba.optim.scratch import ScratchPlacement
from zorba.optim.terms import Evaluate, Terms
from zorba.tables import DeviceTables, Tables
from zorba_kernels.noise import Distribution

Batches = Callable[[int, int], tuple[Any, int]]
"""``batches(round, step)`` returns a batch and its number of examples, always the same ones."""


@dataclass(eq=False, repr=False)
class ModelObjective:
    """An ``Objective`` of ``Client``: the loss of a model, perturbed exactly.

    Noise of distribution "rank1" is made inside of the forwards where the parameters' modules can
    do it (placement "fused"), other noise in a copy of the weights (placement "scratch").
    Only the blocks that a plan's mask activates are perturbed. Where the model is offloaded
    (``zorba.offload.Offload``), blocks move between host and device as the mask says, and the table
    must be ``DeviceTables`` (ValueError).
    """

    model: nn.Module  # that ``loss`` runs
    table: Tables  # of its trainable parameters, the replica's; group b is block b
    batches: Batches
    # Of a batch, a number or a tensor of one element; or with ``per_example`` of each example,
    # Tensor [examples].
    loss: Callable[[Any], float | Tensor]
    distribution: Distribution  # of the noise, the replica's
    # Whether ``loss`` tells the examples apart, as directions of their own in one forward need it,
    # and ``Privacy`` with the unit "example". Else the scalars are those of the examples' mean.
    per_example: bool = False

    def __post_init__(self) -> None:
        # A ParamTable holds addresses, which a block that moves leaves behind.
        if Offload.of(self.model) is not None and not isinstance(self.table, DeviceTables):
            raise ValueError(
                "the blocks of an offloaded model move: give DeviceTables of its parameters as the "
                "table, to the replica too"
            )
        # In float64: a difference of losses that nearly agree has few digits left in float32.
        self._read: Callable[[Any], Any] = float
        if self.per_example:
            self._read = lambda losses: losses.detach().double().cpu().numpy()
        self._active: list[int] | None = None
        self._fused = self.distribution == "rank1" and not unfusable(
            self.model, self._part(range(self.table.num_groups))
        )

    @property
    def by_row(self) -> bool:
        """Whether it takes ``RowTerms``; the argument of ``Client``."""
        return self._fused and self.per_example

    def __call__(self, round_number: int, step: int) -> tuple[Evaluate, int]:
        """See ``Objective``."""
        batch, count = self.batches(round_number, step)

        @torch.no_grad()
        def evaluate(noises: Sequence[Terms]) -> Sequence[Any]:
            groups = range(self.table.num_groups)
            self._activate([g for g in groups if any(terms.active(g) for terms in noises)])
            with self._evaluator.step(lambda: self.loss(batch)) as losses_at:
                both = None if self._evaluator.reuses else batch
                return self._both_signs(losses_at, noises, self.loss, both)

        return evaluate, count

    def _activate(self, active: list[int]) -> None:
        """Makes placement and evaluator, which stay as long as the same blocks are active."""
        if active == self._active:
            self._placement.refresh()  # somebody may have moved the model since the last step
            return
        self._active = None
        # Blocks move before the table is made: it holds addresses.
        offload = Offload.of(self.model)
        if offload is not None:
            # By parameters, not by numbers: an offload may know more blocks than are trained.
            names = {entry.name for entry in self.table.entries if entry.group in active}
            offload.set_active([b.name for b in offload.blocks if names & set(b.parameters)])
        # Of active blocks alone: scratch is made for each parameter of a table, perturbed or not.
        how = (self.model, self._part(active), self.distribution)
        self._placement: Placement = FusedPlacement(*how) if self._fused else ScratchPlacement(*how)
        self._evaluator: Evaluator = Evaluator(self.model, self._placement, True, self._read)
        self._both_signs = BothSigns(self._placement, self._evaluator.drew)
        self._active = active

    def _part(self, groups: Collection[int]) -> zk.ParamTable:
        """A table of some groups' parameters."""
        entries = [entry for entry in self.table.entries if entry.group in groups]
        return zk.ParamTable(
            {entry.name: entry.source for entry in entries},
            groups={entry.name: entry.group for entry in entries},
            num_groups=self.table.num_groups,
        )
