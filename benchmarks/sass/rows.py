"""Rows of the table, one hot path each, and their record.

The hot path is that of a pass of one term, of a further term in a pass of many, or of noise in the
inputs or outputs of a layer.

recorded.json is written by ``python -m benchmarks.sass --record``. Another compiler than the one it
names may count otherwise; the same 10 % apply, because what matters is the code that it makes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any, NamedTuple

from benchmarks.sass import pipes
from benchmarks.sass.disassembly import Code, register
from benchmarks.sass.flow import Path, blocks_of, hot_paths, quiet_loops
from zorba_kernels.noise import DISTRIBUTIONS
from zorba_kernels.table import DTYPE_CODES

FILE = FilePath(__file__).with_name("recorded.json")
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
TOLERANCE = 1.10
TRITON_TO_CUDA = 1.3
LIMITS = {  # slots a weight of the CUDA kernels: bfloat16, no decay
    ("gaussian", "nearest"): 26.0,
    ("gaussian", "stochastic"): 32.0,
    ("rademacher", "nearest"): 7.0,
}
RECORD = "if that is meant, run: python -m benchmarks.sass --record"
CUDA_KERNEL = re.compile(r"add_noise\w*ILN\w*?Distribution\w*?E([012])ELb([01])E\w*?(Single|Many)")
PERTURB = re.compile(r"perturb_outputs\w*?DTypeE([012])E")


@dataclass(frozen=True)
class Row:
    """A hot path, without the work that a tile of weights takes once: its place, CUDA's signs."""

    backend: str  # "cuda", "triton" or "tl.randn"
    distribution: str  # or "perturb"
    rounding: str  # or what the path goes over: "further term", "inputs", "outputs"
    dtype: str  # or "" where the path is the same for all
    decay: bool  # with weight decay in the same pass
    weights: int  # that a lane handles on the path
    slots: int
    pipes: dict[str, int] = field(compare=False)
    registers: int

    @property
    def work(self) -> str:
        decay = " with decay" if self.decay else ""
        return f"{self.distribution} {self.rounding} {self.dtype}".strip() + decay

    @property
    def name(self) -> str:
        return f"{self.backend} {self.work}"

    @property
    def slots_per_weight(self) -> float:
        return round(self.slots / self.weights, 2)

    @property
    def bound(self) -> float:
        """Cycles of a scheduler a weight, see pipes.py."""
        return round(pipes.bound(self.pipes) / self.weights, 2)


class Counted(NamedTuple):
    """What was found in some machine code."""

    rows: list[Row]
    kernels: list[Code]  # none of which may spill
    versions: dict[str, str]  # of the compilers, by backend: all rows of these must be there


def row_of(code: Code, path: Path, weights: int, **about: Any) -> Row:
    busy = pipes.count_pipes(path)
    return Row(**about, weights=weights, slots=len(path), pipes=busy, registers=code.registers)


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


def cuda_rows(code: Code) -> list[Row]:
    """Counts one kernel; no rows if there is nothing in it to count."""
    if match := PERTURB.search(code.name):
        dtype = str(DTYPES[int(match[1])]).removeprefix("torch.")
        return perturb_rows(code, backend="cuda", dtype=dtype)
    match = CUDA_KERNEL.search(code.name)
    if match is None:
        return []
    if match[3] == "Many":
        return cuda_term_rows(code, DISTRIBUTIONS[int(match[1])], stochastic=match[2] == "1")
    about: dict[str, Any] = {
        "backend": "cuda",
        "distribution": DISTRIBUTIONS[int(match[1])],
        "rounding": "stochastic" if match[2] == "1" else "nearest",
        "decay": False,
    }
    found: list[Row] = []
    for hot in hot_paths(blocks_of(code.instructions)):
        dtype = stored_dtype(hot)
        weights = sum(i.stored_bytes for i in hot if i.is_wide_store) // itemsize(dtype)
        found.append(row_of(code, hot, weights, dtype=dtype, **about))
    found.sort(key=lambda r: (r.dtype, r.slots))
    # A loop comes twice for each dtype: without decay, and with it, which takes more slots.
    firsts = {row.dtype: row for row in reversed(found)}
    return [replace(row, decay=row is not firsts[row.dtype]) for row in found]


def cuda_term_rows(code: Code, distribution: str, stochastic: bool) -> list[Row]:
    """The loop over terms whose signs are made, which is the same for all dtypes and roundings."""
    # A product of the tensor cores gives a lane four signs, each of a weight.
    loops = [path for path in quiet_loops(blocks_of(code.instructions)) if count(path, "HMMA")]
    if stochastic or not loops:
        return []
    hot = min(loops, key=lambda path: len(path) / count(path, "HMMA"))
    about = {"distribution": distribution, "rounding": "further term", "dtype": ""}
    return [row_of(code, hot, 4 * count(hot, "HMMA"), backend="cuda", decay=False, **about)]


def perturb_rows(code: Code, **about: Any) -> list[Row]:
    """The loops over a token's inputs and outputs, of the kernel of one dtype."""
    more = {"distribution": "perturb", "decay": False, **about}
    blocks = blocks_of(code.instructions)
    (out,) = hot_paths(blocks)
    outputs = sum(i.stored_bytes for i in out) // itemsize(about["dtype"])
    # An addition each; aligned loads are the way with fewer instructions.
    loops = [path for path in quiet_loops(blocks) if count(path, "FADD") >= outputs]
    into = min(loops, key=len)
    return [
        row_of(code, into, outputs, rounding="inputs", **more),
        row_of(code, out, outputs, rounding="outputs", **more),
    ]


def triton_rows(code: Code, **about: Any) -> list[Row]:
    """Counts a Triton kernel, which serves one dtype."""
    if about["distribution"] == "perturb":
        return perturb_rows(code, **about)
    row = triton_term_row if about["rounding"] == "further term" else triton_row
    return [row(code, **about)]


def triton_term_row(code: Code, **about: Any) -> Row:
    """The loop over terms of a pass that rounds to nearest, signs or normals included."""
    # It adds to each weight of the lane, as the loop over rounds does too, and makes Philox calls.
    loops = [
        path
        for path in quiet_loops(blocks_of(code.instructions))
        if count(path, "FADD") >= 16 and count_products(path) >= 18
    ]
    hot = min(loops, key=len)
    return row_of(code, hot, count(hot, "FADD"), **about)


def count_products(path: Path) -> int:
    """Products of 64 bits, of which a Philox call has some 20."""
    return sum(i.name.startswith(("IMAD.WIDE", "IMAD.HI")) for i in path)


def count(path: Path, opcode: str) -> int:
    return sum(i.opcode == opcode for i in path)


def triton_row(code: Code, **about: Any) -> Row:
    """A pass of one term; a lane's weights are what it stores."""
    size = itemsize(about["dtype"])
    paths = hot_paths(blocks_of(code.instructions))
    counted = [(hot, sum(i.stored_bytes for i in hot) // size) for hot in paths]
    hot, weights = min(counted, key=lambda found: len(found[0]) / found[1])
    return row_of(code, hot, weights, **about)


def itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


# --- The record ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """The contents of recorded.json."""

    versions: dict[str, str]  # of the compilers, by backend
    slots: dict[str, float]  # a weight, by name of the row

    @classmethod
    def load(cls, file: FilePath = FILE) -> Recorded:
        return cls(**json.loads(file.read_text())) if file.is_file() else cls({}, {})

    def save(self, file: FilePath = FILE) -> None:
        file.write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")

    def updated(self, counted: Counted) -> Recorded:
        """With other rows for the backends that were counted."""
        kept = {n: slots for n, slots in self.slots.items() if n.split()[0] not in counted.versions}
        slots = {row.name: row.slots_per_weight for row in counted.rows}
        return Recorded(self.versions | counted.versions, kept | slots)

    def limit_of(self, row: Row, rows: list[Row]) -> float | None:
        """Returns the most slots that a kernel may take, whatever is recorded of it."""
        limit = LIMITS.get((row.distribution, row.rounding))
        if limit is None or row.dtype != "bfloat16" or row.decay or row.backend == "tl.randn":
            return None
        return limit if row.backend == "cuda" else TRITON_TO_CUDA * self.cuda_slots(row, rows)

    def cuda_slots(self, row: Row, rows: list[Row]) -> float:
        """Slots of the CUDA kernel that does the same: as counted, or else as recorded, or nan."""
        known = self.slots | {r.name: r.slots_per_weight for r in rows}
        return known.get(f"cuda {row.work}", float("nan"))

    def failures(self, counted: Counted) -> Iterator[str]:
        rows, versions = counted.rows, counted.versions
        for kernel in counted.kernels:
            if kernel.stack_bytes or kernel.local_accesses:
                yield (
                    f"{kernel.name}: spills ({kernel.stack_bytes} bytes of stack, "
                    f"{kernel.local_accesses} accesses of local memory); expected none: hold less "
                    "in registers"
                )
        for row in rows:
            if row.backend == "tl.randn":  # not ours to improve
                continue
            now, before = row.slots_per_weight, self.slots.get(row.name)
            limit = self.limit_of(row, rows)
            if limit is not None and not now <= limit:
                said = f" ({TRITON_TO_CUDA} x CUDA's)" if row.backend == "triton" else ""
                yield f"{row.name}: {now} slots a weight; the limit is {limit:.4g}{said}"
            if before is None:
                yield f"{row.name}: found in the machine code, but not recorded; {RECORD}"
            elif now > TOLERANCE * before:
                then = self.versions.get(row.backend, "unknown")
                yield (
                    f"{row.name}: {now} slots a weight, recorded are {before} "
                    f"(+{now / before - 1:.0%}, 10 % are allowed; compiled by "
                    f"{versions[row.backend]}, recorded with {then}); {RECORD}"
                )
        for name, times in Counter(row.name for row in rows).items():
            if times > 1:
                yield f"{name}: {times} hot paths look alike; expected one: see rows.py"
        for name in sorted(self.slots.keys() - {row.name for row in rows}):
            if name.split()[0] in versions:
                yield f"{name}: recorded, but not found in the machine code; {RECORD}"

    def notes(self, versions: dict[str, str]) -> list[str]:
        """Compilers other than the recorded ones."""
        return [
            f"note: {backend} was compiled by {now}, recorded with {self.versions[backend]}"
            for backend, now in versions.items()
            if self.versions.get(backend, now) != now
        ]
