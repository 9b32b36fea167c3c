"""The obvious Triton kernel for the same pass: ``w += eps * tl.randn(seed, index)``.

tl.randn takes the sine and cosine of its Box-Muller transform from a library, and one Philox call
for each element. Its values depend on the version of Triton.
"""

from __future__ import annotations

from collections.abc import Iterable

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit(do_not_specialize=["seed"])
def add_randn(p_w, n, seed, eps, block: tl.constexpr):
    o_w = tl.program_id(0) * block + tl.arange(0, block)
    m_w = o_w < n
    b_w = tl.load(p_w + o_w, mask=m_w).to(tl.float32)
    b_w += eps * tl.randn(seed, o_w)
    tl.store(p_w + o_w, b_w.to(p_w.dtype.element_ty), mask=m_w)


def perturb(parameters: Iterable[Tensor], seed: int, eps: float) -> None:
    """Adds ``eps * z`` to every tensor, of fewer than 2**31 elements, each with its own seed.

    Indices stay int32: 64-bit ones would make tl.randn take its slower 64-bit Philox.
    """
    for i, p in enumerate(parameters):
        grid = (triton.cdiv(p.numel(), BLOCK),)
        add_randn[grid](p, p.numel(), seed + i, eps, block=BLOCK)
