"""Issue slots per weight of the GPU kernels, counted in their machine code. Needs no GPU.

A warp scheduler issues one instruction a cycle, so the instructions on the hot path of a kernel,
divided by the weights (or inputs and outputs of a layer) that a lane handles there, bound its speed
from above. These are counts, not measured times: a kernel may be slower (latencies, caches), never
faster.

    python -m benchmarks.sass [--record]

Exits with 1 when a kernel of the installed extension or of the Triton backend spills, exceeds its
limit, or exceeds its count in recorded.json by more than 10 %; ``--record`` writes that file.

disassembly.py reads the machine code, flow.py finds the hot paths, pipes.py knows the throughput of
the pipes, rows.py counts and compares, triton_code.py compiles Triton kernels without a GPU.
"""
