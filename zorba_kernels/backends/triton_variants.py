"""Every Triton kernel that the backend may launch, compiled without a GPU.

For tests and for counts of instructions: what is compiled here has the arguments, flags and options
of a launch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from zorba_kernels.backends import triton
from zorba_kernels.backends.triton_tuning import TILE, candidates
from zorba_kernels.noise import DISTRIBUTION_CODES, DISTRIBUTIONS, ROUNDINGS
from zorba_kernels.table import DTYPE_CODES


@dataclass(frozen=True)
class Variant:
    """A kernel with its compile-time flags and launch options."""

    name: str
    op: str  # also the name of its module in zorba_kernels.kernels
    flags: dict[str, Any]
    options: dict[str, Any]

    def compile(self, arch: int = 90) -> Any:
        """Returns Triton's ``CompiledKernel`` for an NVIDIA architecture; ``asm`` has the cubin."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.compiler import compile as compile_source

        kernel = triton.kernel(self.op)
        # As a launch does: types by annotation, and no value specialised on.
        types = {p.name: p.annotation_type or "constexpr" for p in kernel.params}
        values = {(kernel.arg_names.index(name),): value for name, value in self.flags.items()}
        source = ASTSource(kernel, types, values, {})
        return compile_source(source, target=GPUTarget("cuda", arch, 32), options=self.options)


def variants(every_candidate: bool = False) -> Iterator[Variant]:
    """Yields what a launch may use; ``every_candidate``: also what only tuning may choose."""
    names = {code: str(dtype).removeprefix("torch.") for dtype, code in DTYPE_CODES.items()}
    forms = {"one": (False, False), "one with decay": (False, True), "many": (True, True)}
    for form, distribution, stochastic, code in itertools.product(
        forms, DISTRIBUTIONS, (False, True), names
    ):
        if stochastic and code == DTYPE_CODES[torch.float32]:
            continue  # always to nearest
        many, decays = forms[form]
        flags = {
            "DISTRIBUTION": DISTRIBUTION_CODES[distribution], "STOCHASTIC": stochastic,
            "MANY": many, "DECAYS": decays, "TILE": TILE, "DTYPE": code,
        }  # fmt: skip
        # Tuning may choose any; without it (small tables, captured graphs) the first one runs.
        chosen = candidates(flags)
        for config in chosen if every_candidate else chosen[:1]:
            options = config.options()
            rounding, pieces = ROUNDINGS[stochastic], f"{config.strip}x{config.warps}"
            name = f"add_noise/{form} {distribution} {rounding} {names[code]} {pieces}"
            strip = {"STRIP": options.pop("STRIP")}
            yield Variant(name, "add_noise", flags | strip, options | triton.EXACT)
    for distribution, code in DISTRIBUTION_CODES.items():
        flags = {"DISTRIBUTION": code, "BLOCKS": triton.NOISE_BLOCKS}
        yield Variant(f"noise/{distribution}", "noise", flags, dict(triton.EXACT))
    for has_x, transposed, code in itertools.product((True, False), (False, True), names):
        flags = {
            "DTYPE": code, "HAS_X": has_x, "TRANSPOSED": transposed,
            "PIECE": triton.PERTURBED_PIECE,
        }  # fmt: skip
        name = f"perturb {names[code]}{' x' * has_x}{' transposed' * transposed}"
        yield Variant(name, "perturbed_linear", flags, dict(triton.PERTURBED))
    flags = {"TILE": TILE, "LANES": triton.LANES}
    yield Variant("fingerprint", "fingerprint", flags, dict(triton.EXACT))
