"""Machine code of Triton kernels for sm_90, compiled without a GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from benchmarks.peers import tl_randn
from zorba_kernels.backends.triton_variants import Variant, variants
from zorba_kernels.noise import DISTRIBUTION_CODES, DISTRIBUTIONS
from zorba_kernels.table import DTYPE_CODES

TARGET = GPUTarget("cuda", 90, 32)
Compiled = tuple[bytes, dict[str, Any]]  # a cubin, and the fields of ``Row`` that it is for


def compile_all(some: Iterable[Variant], arch: int) -> list[CompiledKernel]:
    """Compiles in two threads, without garbage collection.

    Until CPython 3.11.8 the depth that ``ast.parse`` counts is shared by all threads: where a
    finalizer, run by a collection in the middle of a parse, lets the other thread parse, both fail
    with "AST constructor recursion depth mismatch" (github.com/python/cpython/issues/106905).
    """
    gc.disable()
    try:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda variant: variant.compile(arch), some))
    finally:
        gc.enable()


def kernels() -> list[Compiled]:
    """What is counted, with the configuration of small tables.

    That is every variant of the pass of one term, a pass of many terms for each noise of signs, and
    noise in the outputs of a layer.
    """
    some = [v for v in variants() if is_counted(v)]
    made = compile_all(some, TARGET.arch)
    return [(bytes(k.asm["cubin"]), about(v)) for v, k in zip(some, made, strict=True)]


def is_counted(variant: Variant) -> bool:
    flags = variant.flags
    if variant.op == "perturbed_linear":
        return bool(flags["HAS_X"] and not flags["TRANSPOSED"])
    if variant.op != "add_noise":
        return False
    # The loop over terms is the same for all dtypes and roundings: one stands for all.
    plain = flags["DTYPE"] == DTYPE_CODES[torch.bfloat16] and not flags["STOCHASTIC"]
    signs = flags["DISTRIBUTION"] != DISTRIBUTION_CODES["gaussian"]
    return (plain and signs) if flags["MANY"] else True


def about(variant: Variant) -> dict[str, Any]:
    flags = variant.flags
    names = {code: str(dtype).removeprefix("torch.") for dtype, code in DTYPE_CODES.items()}
    if variant.op == "perturbed_linear":
        return {"backend": "triton", "distribution": "perturb", "dtype": names[flags["DTYPE"]]}
    distribution = DISTRIBUTIONS[flags["DISTRIBUTION"]]
    if flags["MANY"]:
        term = {"rounding": "further term", "dtype": "", "decay": False}
        return {"backend": "triton", "distribution": distribution, **term}
    return {
        "backend": "triton",
        "distribution": distribution,
        "rounding": "stochastic" if flags["STOCHASTIC"] else "nearest",
        "dtype": names[flags["DTYPE"]],
        "decay": flags["DECAYS"],
    }


def peer() -> Compiled:
    """``tl.randn``, 8 bfloat16 weights a lane."""
    types = {"p_w": "*bf16", "n": "i32", "seed": "i32", "eps": "fp32", "block": "constexpr"}
    aligned = {(k,): [["tt.divisibility", 16]] for k in range(2)}  # as a launch finds out by itself
    source = ASTSource(tl_randn.add_randn, types, {"block": 1024}, aligned)
    options = {"num_warps": 4, "enable_fp_fusion": True}
    cubin = bytes(triton.compile(source, target=TARGET, options=options).asm["cubin"])
    about = {"backend": "tl.randn", "distribution": "gaussian", "rounding": "nearest"}
    return cubin, {**about, "dtype": "bfloat16", "decay": False}
