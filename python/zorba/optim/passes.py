"""Passes over a table, until ``zorba_kernels`` offers ``Program`` and ``ParamTable.run``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import zorba_kernels as zk
from zorba_kernels.dispatch import choose
from zorba_kernels.eager import run_program
from zorba_kernels.program import make_program


class Program:
    """What one pass adds."""

    def __init__(
        self,
        seeds: Sequence[int],
        coefs: Tensor,
        distribution: str,
        rounding: str = "nearest",
        rounding_seed: int | None = None,
        *,
        samples: Sequence[int] | None = None,
        decay: Tensor | None = None,
    ) -> None:
        self.program = make_program(
            seeds, coefs, len(coefs), distribution, rounding, rounding_seed, samples, None, decay
        )


def run(table: zk.ParamTable, program: Program, out: zk.ParamTable | None = None) -> None:
    """Adds a program's noise to every tensor, in place or into the tensors of ``out``."""
    target = table if out is None else out
    run_program(table, target, program.program, choose(None, table.device))
