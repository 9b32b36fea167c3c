"""Machine code of Triton kernels for sm_90, compiled without a GPU."""

from __future__ import annotations

from collections.abc import Mapping

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.peers import tl_randn
from benchmarks.sass.disassembly import assembler
from benchmarks.sass.rows import Compiled
from benchmarks.sass.threads import compiling_threads
from zorba_kernels.backends.triton_variants import Variant, variants
from zorba_kernels.noise import DISTRIBUTIONS
from zorba_kernels.table import DTYPE_CODES

TARGET = GPUTarget("cuda", 90, 32)


def cubin_of(
    kernel: triton.JITFunction,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    aligned: tuple[str, ...] = (),
    **options: object,
) -> bytes:
    """Compiles a kernel.

    Args:
        kernel: of ``triton.jit``.
        signature: type of each argument that is no constant, such as "*bf16", "i32" or "fp32".
        constants: the values of the others.
        aligned: arguments that are a multiple of 16, as a launch finds out by itself.
        options: ``num_warps``, ``enable_fp_fusion`` and such.
    """
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, types, dict(constants), attributes)
    compiled = triton.compile(source, target=TARGET, options=options)
    return bytes(compiled.asm["cubin"])


def add_noise() -> list[Compiled]:
    """Every variant of the backend's ``add_noise``, with the configuration of small tables."""
    with compiling_threads() as pool:
        return list(pool.map(_compiled, (v for v in variants() if v.op == "add_noise")))


def _compiled(variant: Variant) -> Compiled:
    flags = variant.flags
    names = {code: str(dtype).removeprefix("torch.") for dtype, code in DTYPE_CODES.items()}
    return Compiled(
        variant.op,
        DISTRIBUTIONS[flags["DISTRIBUTION"]],
        "stochastic" if flags["STOCHASTIC"] else "nearest",
        "many" if flags["MANY"] else "one",
        names[flags["DTYPE"]],
        flags["DECAYS"] and not flags["MANY"],  # that of a round is no part of its terms
        bytes(variant.compile(TARGET.arch).asm["cubin"]),
    )


def peer() -> Compiled:
    """``tl.randn``, 8 bfloat16 weights a lane."""
    cubin = cubin_of(
        tl_randn.add_randn,
        {"p_w": "*bf16", "n": "i32", "seed": "i32", "eps": "fp32"},
        {"block": 1024},
        aligned=("p_w", "n"),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return Compiled("tl.randn", "gaussian", "nearest", "one", "bfloat16", False, cubin)


def versions(compiled: Compiled) -> str:
    """What made a cubin."""
    return f"triton {triton.__version__}, ptxas {assembler(compiled.cubin)}"
