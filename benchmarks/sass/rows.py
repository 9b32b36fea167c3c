"""Rows of the table: one hot path each, of one variant of one kernel."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

from benchmarks.sass import pipes
from benchmarks.sass.disassembly import Code, disassemble, register
from benchmarks.sass.flow import Blocks, Path, blocks_of, hot_paths
from benchmarks.sass.terms import Loop, sign_batch, term_loops, wide_products
from zorba_kernels.noise import DISTRIBUTIONS

ARCH = "sm_90"
HELD = 16  # weights that a lane of a CUDA kernel holds while it goes through the terms of a program
BATCH = 32  # terms whose signs a warp makes together (csrc/cuda/signs.h)
SIGNS_HELD = 32  # weights that a lane holds meanwhile

CUDA_KERNEL = re.compile(r"add_noise\w*ILN\w*?Distribution\w*?E([01])ELb([01])E\w*?(Single|Many)")


@dataclass(frozen=True)
class Row:
    """A hot path, per weight.

    ``terms`` says what is counted: "one" is a whole pass of one term, "each" is one more term in
    the same pass, and "signs" is that term's share of making the signs of a batch of terms. What a
    tile or a strip of weights takes once is not counted: for "one", where in its parameter a tile
    lies and, in CUDA, its signs; for "each", loading, rounding and storing.
    """

    backend: str  # "cuda", "triton" or "peer"
    kernel: str
    distribution: str
    rounding: str
    terms: str
    dtype: str  # "any": alike for all
    decay: bool  # with weight decay in the same pass
    weights: int  # that a lane handles on the path, times the terms it adds to each
    slots: int
    pipes: dict[str, int] = field(compare=False)
    registers: int
    stack_bytes: int
    local_accesses: int

    @property
    def name(self) -> str:
        """What tells it from the other rows."""
        return f"{self.backend} {self.kernel} {self.work(self.dtype)}"

    @property
    def is_plain(self) -> bool:
        """Whether it is the pass that limits are made for: one term, bfloat16, no decay."""
        return self.terms == "one" and self.dtype == "bfloat16" and not self.decay

    def work(self, dtype: str) -> str:
        """What it does, in words, to weights of a dtype."""
        decay = " with decay" if self.decay else ""
        return f"{self.distribution} {self.rounding} {self.terms} {dtype}{decay}"

    @property
    def slots_per_weight(self) -> float:
        return round(self.slots / self.weights, 2)

    @property
    def bound(self) -> float:
        """Cycles of a scheduler a weight, see pipes.py."""
        return round(pipes.bound(self.pipes) / self.weights, 2)

    @property
    def spills(self) -> bool:
        """Whether the kernel has a stack or uses local memory."""
        return self.stack_bytes > 0 or self.local_accesses > 0


def row_of(code: Code, path: Path, weights: int, **about: Any) -> Row:
    """Counts a path."""
    used = {name: getattr(code, name) for name in ("registers", "stack_bytes", "local_accesses")}
    return Row(**about, weights=weights, slots=len(path), pipes=pipes.count_pipes(path), **used)


def term_rows(code: Code, blocks: Blocks, loops: list[Loop], **about: Any) -> Iterator[Row]:
    """The loop over terms, in the cheapest of its forms: others start or end a round."""
    if loops:
        loop = min(loops, key=lambda one: one.slots_per_weight)
        yield row_of(code, loop.path, loop.added, terms="each", **about)
        batch = None if loop.makes_noise else sign_batch(blocks, loop.path)
        if batch is not None:
            yield row_of(code, batch, BATCH * SIGNS_HELD, terms="signs", **about)


def stored_dtype(path: Path) -> str:
    """Dtype of the weights that a path stores 16 bytes at a time."""
    at, register_of = next(
        (k, register(i.arguments[-1])) for k, i in enumerate(path) if i.is_wide_store
    )
    # The path is a loop, so what comes after the store also comes before it.
    for i in reversed([*path[at:], *path[:at]]):
        if register(i.arguments[0]) != register_of or i.opcode.startswith("ST"):
            continue
        if i.opcode == "MOV" or i.name.startswith("IMAD.MOV"):
            register_of = register(i.arguments[-1])
        elif i.opcode in ("FADD", "FFMA"):
            return "float32"
        else:
            break
    half = ("HADD2.F32", "F2FP.F16")
    return "float16" if any(i.name.startswith(half) for i in path) else "bfloat16"


def cuda_rows(path: FilePath) -> list[Row]:
    """Counts every add_noise kernel of a file."""
    return [row for code in disassemble(path, ARCH) for row in rows_of_cuda(code)]


def rows_of_cuda(code: Code) -> list[Row]:
    """Counts one kernel, which serves all dtypes; none if it is no add_noise."""
    match = CUDA_KERNEL.search(code.name)
    if match is None:
        return []
    about: dict[str, Any] = {
        "backend": "cuda",
        "kernel": f"add_noise/{match[3].lower()}",
        "distribution": DISTRIBUTIONS[int(match[1])],
        "rounding": "stochastic" if match[2] == "1" else "nearest",
        "decay": False,
    }
    blocks = blocks_of(code.instructions)
    if match[3] == "Many":
        return list(term_rows(code, blocks, term_loops(blocks, HELD), dtype="any", **about))
    found: list[Row] = []
    for hot in hot_paths(blocks):
        dtype = stored_dtype(hot)
        weights = sum(i.stored_bytes for i in hot if i.is_wide_store) // itemsize(dtype)
        found.append(row_of(code, hot, weights, terms="one", dtype=dtype, **about))
    found.sort(key=lambda r: (r.dtype, r.slots))
    # A loop comes twice for each dtype: without decay, and with it, which takes more slots.
    firsts = {row.dtype: row for row in reversed(found)}
    return [replace(row, decay=row is not firsts[row.dtype]) for row in found]


def triton_rows(cubin: bytes, **about: Any) -> list[Row]:
    """Counts a Triton kernel, which serves one dtype; ``about`` are fields of ``Row``.

    A lane's weights are what it stores on the hot path. Of a kernel of many terms only the loop
    over them is counted.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (code,) = disassemble(FilePath(file.name))
    blocks = blocks_of(code.instructions)
    if about.pop("terms") == "many":
        loops = term_loops(blocks, 1)
        # A round that passes all its terms by is a loop that adds to float32 weights, too, but
        # makes no noise: it has few wide products. All of a Philox call need not be there
        # either, as those that are alike for all lanes may be made elsewhere.
        most = max((wide_products(loop.path) for loop in loops), default=0)
        noisy = [loop for loop in loops if 2 * wide_products(loop.path) >= most]
        return list(term_rows(code, blocks, noisy, **about))
    size = itemsize(about["dtype"])
    counted = [(hot, sum(i.stored_bytes for i in hot) // size) for hot in hot_paths(blocks)]
    hot, weights = min(counted, key=lambda found: len(found[0]) / found[1])
    return [row_of(code, hot, weights, terms="one", **about)]


def itemsize(dtype: str) -> int:
    """Bytes of a weight."""
    return 4 if dtype == "float32" else 2
