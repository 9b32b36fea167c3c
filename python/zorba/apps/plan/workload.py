"""What a client computes in a step, as far as its memory depends on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from zorba.defaults import ESTIMATOR, ESTIMATORS, NUM_PERTURBATIONS, Estimator
from zorba.planning.memory import IdlePolicy
from zorba_kernels.program import check_choice

LossKind = Literal["label-words", "text"]
LOSSES: tuple[LossKind, ...] = get_args(LossKind)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Workload:
    """A step of a client.

    Attributes:
        batch_size: sequences in a batch.
        length: tokens of the longest one; the others are padded to it.
        num_perturbations: P.
        estimator: "central" (2P evaluations) or "forward" (P + 1).
        loss: "label-words" reads a few logits of each sequence, "text" those of all positions.
        dtype: of the weights, and of the forward.
        idle: where idle blocks live. Offloaded, all evaluations of a step run side by side.
    """

    batch_size: int = 16
    length: int = 64
    num_perturbations: int = NUM_PERTURBATIONS
    estimator: Estimator = ESTIMATOR
    loss: LossKind = "label-words"
    dtype: str = "float32"
    idle: IdlePolicy = "offload"

    def __post_init__(self) -> None:
        for what in ("batch_size", "length", "num_perturbations"):
            value = getattr(self, what)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{what} must be an integer, at least 1, got {value!r}")
        check_choice("estimator", self.estimator, ESTIMATORS)
        check_choice("loss", self.loss, LOSSES)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("idle", self.idle, get_args(IdlePolicy))

    @property
    def tokens(self) -> int:
        """Positions of a batch, padding included."""
        return self.batch_size * self.length

    @property
    def evaluations(self) -> int:
        """Evaluations of a step."""
        central = self.estimator == "central"
        return 2 * self.num_perturbations if central else self.num_perturbations + 1

    def resident(self) -> Workload:
        """Returns the same work with idle blocks on the device."""
        return replace(self, idle="resident")
