"""Compiles a share of the Triton kernels that later stages launch or tune.

``triton.autotune`` compiles one candidate after the other, some 100 in all: a few minutes. Several
of these processes leave them in Triton's cache in a fraction of that time.

    python -m benchmarks.gpu.precompile PART PARTS
"""

from __future__ import annotations

import sys

from zorba_kernels.backends import triton
from zorba_kernels.backends.triton_variants import variants


def main(part: int, parts: int) -> None:
    """Compiles every ``parts``-th variant for the current device, as a launch would, and runs none.

    Triton finds a kernel in its cache only by what a launch makes of the arguments: ``warmup`` goes
    the same way. No argument is specialised on, so that any value stands for all.
    """
    for variant in list(variants(every_candidate=True))[part::parts]:
        kernel = triton.kernel(variant.op)
        arguments = {p.name: 0 for p in kernel.params if not p.is_constexpr}
        kernel.warmup(grid=(1,), **arguments, **variant.flags, **variant.options)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
