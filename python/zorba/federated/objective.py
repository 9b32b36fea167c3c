"""What a client measures that holds a whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import zorba_kernels as zk
from zorba.offload import Offload
from zorba.optim.evaluation import Evaluator
from zorba.optim.scratch import ScratchPlacement
from zorba.optim.terms import Evaluate, NoiseTerms
from zorba.tables import DeviceTables, Tables
from zorba_kernels.noise import Distribution

Batches = Callable[[int, int], tuple[Any, int]]
"""``batches(round, step)`` returns a batch and its number of examples, always the same ones."""


class ModelObjective:
    """An ``Objective`` of ``Client``: the loss of a model, perturbed exactly (placement "scratch").

    Only the blocks that a plan's mask activates are perturbed. Where the model is offloaded
    (``zorba.offload.Offload``), blocks move between host and device as the mask says.

    Args:
        model: what ``loss`` runs.
        table: its trainable parameters, the replica's; group b is block b. ``DeviceTables`` where
            the model is offloaded.
        batches: picks a batch, see ``Batches``.
        loss: returns the loss of a batch, a number or a tensor of one element; or with
            ``per_example`` the loss of each example, Tensor [examples].
        distribution: of the noise, the replica's.
        prefix_reuse: whether blocks that no perturbation can reach run once a step.
        per_example: whether ``loss`` tells the examples apart, as ``Privacy`` with the unit
            "example" needs it. Without privacy the scalars are those of the examples' mean.

    Raises:
        ValueError: the model is offloaded, and the table is no ``DeviceTables``.
    """

    def __init__(
        self,
        model: nn.Module,
        table: Tables,
        batches: Batches,
        loss: Callable[[Any], float | Tensor],
        distribution: Distribution,
        prefix_reuse: bool = True,
        per_example: bool = False,
    ) -> None:
        # A ParamTable holds addresses, which a block that moves leaves behind.
        if Offload.of(model) is not None and not isinstance(table, DeviceTables):
            raise ValueError(
                "the blocks of an offloaded model move: give DeviceTables of its parameters as the "
                "table, to the replica too"
            )
        self._model = model
        self._table = table
        self._batches = batches
        self._loss = loss
        self._distribution = distribution
        self._prefix_reuse = prefix_reuse
        self._read: Callable[[Any], Any] = _each if per_example else float
        self._active: tuple[int, ...] = ()
        self._evaluator: Evaluator | None = None
        self._placement: ScratchPlacement | None = None

    def __call__(self, round_number: int, step: int) -> tuple[Evaluate, int]:
        """See ``Objective``."""
        batch, count = self._batches(round_number, step)

        @torch.no_grad()
        def evaluate(noises: Sequence[NoiseTerms]) -> Sequence[Any]:
            with self._evaluator_of(noises).step(lambda: self._loss(batch)) as losses_at:
                return losses_at(noises)

        return evaluate, count

    def _evaluator_of(self, noises: Sequence[NoiseTerms]) -> Evaluator:
        """Returns what evaluates at these noises; a new one where other blocks are active."""
        groups = range(self._table.num_groups)
        active = tuple(g for g in groups if any(terms.active(g) for terms in noises))
        # Placement and evaluator stay from round to round: they are made again only where other
        # blocks are active. Parameters may have moved between host and device in the meantime.
        if self._placement is not None:
            self._placement.refresh()
        if self._evaluator is None or self._placement is None or active != self._active:
            # Blocks move before the tables are made: a table holds addresses.
            self._place(set(active))
            self._placement = ScratchPlacement(
                self._model, self._table_of(set(active)), self._distribution
            )
            self._evaluator = Evaluator(
                self._model, self._placement, self._prefix_reuse, self._read
            )
            self._active = active
        return self._evaluator

    def _place(self, active: set[int]) -> None:
        """Brings active blocks to the device, and sends the others to the host."""
        offload = Offload.of(self._model)
        if offload is None:
            return
        # By parameters, not by numbers: an offload may know more blocks than are trained.
        names = {entry.name for entry in self._table.entries if entry.group in active}
        offload.set_active([b.name for b in offload.blocks if names & set(b.parameters)])

    def _table_of(self, active: set[int]) -> zk.ParamTable:
        # Of active blocks alone: scratch is made for each parameter of a table, perturbed or not.
        entries = [entry for entry in self._table.entries if entry.group in active]
        return zk.ParamTable(
            {entry.name: entry.source for entry in entries},
            groups={entry.name: entry.group for entry in entries},
            num_groups=self._table.num_groups,
        )


def _each(losses: Tensor) -> npt.NDArray[np.float64]:
    """Returns losses, Tensor [examples], as an array."""
    # float64: a difference of losses that nearly agree has few digits left in float32.
    numbers: npt.NDArray[np.float64] = losses.detach().double().cpu().numpy()
    return numbers
