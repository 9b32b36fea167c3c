"""Which pipe an instruction takes, and what that bounds on Hopper.

A multiprocessor of compute capability 9.0 has four schedulers, each of which issues one instruction
of 32 lanes a cycle. From the CUDA C++ Programming Guide, "Arithmetic Instructions", table
"Throughput of Native Arithmetic Instructions", results a cycle and multiprocessor: 128 for
float32 add, multiply, multiply-add; 64 for 32-bit integer add, shift, compare, minimum, logic; 64
for integer multiply-add; 16 for reciprocals, roots, logarithms, sines (MUFU) and for counting bits.
So a scheduler takes 1, 2, 2 and 8 cycles for an instruction of the pipes here. Integer
multiply-add shares one of the two float32 pipes. I2FP and F2FP are counted with the ALU, older
conversions (I2F, F2I, F2F) with MUFU. A multiprocessor has 32 load/store units: 4 cycles; and its
tensor cores take 4 for a 16-bit product of 16 x 16 and 16 x 8.

The bound of a path is the largest of: its slots, and what each pipe takes for its share of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from benchmarks.sass.flow import Path

PIPES = {
    "fma": (1, "FFMA FADD FMUL HFMA2 HADD2 HMUL2"),
    "alu": (
        2,
        "LOP3 PLOP3 SHF PRMT SEL FSEL ISETP FSETP FSET IADD3 IADD VIADD VIADDMNMX VIMNMX "
        "IMNMX FMNMX HMNMX2 HSETP2 HSET2 IABS LEA MOV P2R R2P SGXT BMSK VOTE I2FP F2FP",
    ),
    "imad": (2, "IMAD IDP"),
    "xu": (8, "MUFU I2F F2I F2F I2I FRND POPC FLO BREV"),
    "memory": (4, "LD LDG LDS LDC LDL LDSM ST STG STS STL STSM ATOM ATOMG ATOMS RED REDG SHFL"),
    "tensor": (4, "HMMA IMMA"),
    "other": (1, ""),
}
"""Cycles of a scheduler for an instruction, and the instructions."""
PIPE = {opcode: pipe for pipe, (_, opcodes) in PIPES.items() for opcode in opcodes.split()}

# An H200. Its memory is rated at 4.8 TB/s; 4.3 is what a good copy reaches.
LANES = 132 * 4 * 32  # multiprocessors, schedulers, lanes
HERTZ = 1.98e9
BYTES_A_SECOND = 4.3e12


def count_pipes(path: Path) -> dict[str, int]:
    """Instructions of each pipe; "other" are branches, barriers and the uniform datapath."""
    found = Counter(PIPE.get(i.opcode, "other") for i in path)
    return {pipe: found[pipe] for pipe in PIPES}


def bound(pipes: Mapping[str, float]) -> float:
    """Cycles of a scheduler that the busiest of its parts needs."""
    return max(sum(pipes.values()), *(PIPES[pipe][0] * n for pipe, n in pipes.items()))


def budget(dtype: str) -> float:
    """Cycles of a scheduler while the memory moves one weight, there and back, for a lane."""
    moved = 2 * (4 if dtype == "float32" else 2)
    return LANES * HERTZ / (BYTES_A_SECOND / moved)
