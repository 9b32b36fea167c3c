"""Small Triton kernels of the shapes that the count of machine code must cope with."""

import triton
import triton.language as tl


@triton.jit
def add_constant(p_w, n, value, block: tl.constexpr):
    """A tile a program, no loop."""
    o_w = tl.program_id(0) * block + tl.arange(0, block)
    m_w = o_w < n
    tl.store(p_w + o_w, tl.load(p_w + o_w, mask=m_w) + value, mask=m_w)


@triton.jit
def add_constant_in_loop(p_w, n, value, block: tl.constexpr):
    """A persistent kernel: tiles in a loop, with enough arithmetic to be the body of one."""
    for start in range(tl.program_id(0) * block, n, tl.num_programs(0) * block):
        o_w = tl.multiple_of(start, block) + tl.arange(0, block)
        b_w = tl.load(p_w + o_w)
        for _ in tl.static_range(8):
            b_w = b_w * value + 1.0
        tl.store(p_w + o_w, b_w)
