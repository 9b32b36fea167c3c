"""The obvious Triton kernel for the same pass: ``w += eps * tl.randn(seed, index)``.

tl.randn takes the sine and cosine of its Box-Muller transform from a library, and one Philox call
for each element. Its values depend on the version of Triton.
"""

import triton
import triton.language as tl


@triton.jit
def add_randn(p_w, n, seed, eps, block: tl.constexpr):
    """One program adds noise to ``block`` weights."""
    o_w = tl.program_id(0) * block + tl.arange(0, block)
    m_w = o_w < n
    b_w = tl.load(p_w + o_w, mask=m_w).to(tl.float32)
    b_w += eps * tl.randn(seed, o_w)
    tl.store(p_w + o_w, b_w.to(p_w.dtype.element_ty), mask=m_w)
