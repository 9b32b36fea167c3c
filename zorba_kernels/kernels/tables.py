"""Tables in device memory, as kernels read them: rows of ``ParamTable.packed``."""

import triton
import triton.language as tl

FIELDS = tl.constexpr(8)  # zorba_kernels.table.SEGMENT_FIELDS


@triton.jit
def find_segment(ends, count, tile, at):
    """The segment of a tile, not before segment ``at``; ends[i] tiles are in segments up to i."""
    # A program's tiles ascend, so the search starts where the last one ended.
    low = at
    high = (count - 1).to(tl.int64)
    while low < high:
        middle = (low + high) // 2
        if tile >= tl.load(ends + middle):
            low = middle + 1
        else:
            high = middle
    return low
