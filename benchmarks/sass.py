"""Issue slots per weight of the CUDA kernels, counted in their machine code. Needs no GPU.

A warp scheduler issues one instruction a cycle, so the instructions on the hot path of a kernel's
loop, divided by the weights that a lane handles there, bound its speed from above: an H200 has
about 28 to 31 slots to spend on a 16-bit weight before a pass is bound by more than memory.
These are counts, not measured times.

    python benchmarks/sass.py [--arch sm_90] [--json FILE] [FILE]

FILE is anything cuobjdump reads (an extension, an object, a cubin); the installed extension by
default. The hot path is the shortest cycle of the control flow graph through a 16-byte store and
the arithmetic that leads to it; for kernels of many terms the path of one more term is counted too.
"""

from __future__ import annotations

import argparse
import heapq
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

MATH = ("FFMA", "FADD", "FMUL", "LOP3", "IMAD", "PRMT", "SHF", "F2FP", "IADD3")
MIN_MATH = 24  # instructions of arithmetic that make a block worth calling the body of a loop

HELD = 16  # weights that a lane holds while it goes through the terms of a program

LIMITS = {  # slots a weight, bf16, one term; sm_90
    ("gaussian", "nearest"): 26.0,
    ("gaussian", "stochastic"): 32.0,
    ("rademacher", "nearest"): 7.0,
}


@dataclass(frozen=True)
class Instruction:
    """One line of the disassembly."""

    address: int
    guard: str  # predicate, or empty
    name: str
    operands: str


@dataclass
class Block:
    """Instructions that run one after the other."""

    instructions: list[Instruction]
    successors: list[int]  # addresses of first instructions

    def count(self, *prefixes: str) -> int:
        """Number of instructions whose name begins with one of the prefixes."""
        return sum(i.name.startswith(prefixes) for i in self.instructions)

    def wide_stores(self) -> int:
        """Number of 16-byte stores to global memory."""
        return sum(is_wide_store(i) for i in self.instructions)


def is_wide_store(instruction: Instruction) -> bool:
    """Whether it is a 16-byte store to global memory."""
    return instruction.name.startswith("STG.") and instruction.name.endswith(".128")


@dataclass(frozen=True)
class Row:
    """A hot path."""

    kernel: str
    distribution: str
    rounding: str
    terms: str  # "one" (a kernel of one term), "each term", or "besides terms" (of many)
    dtype: str
    weights: int  # a lane handles on the path
    slots: int
    slots_per_weight: float
    registers: int
    stack_bytes: int  # spills and local arrays
    local_memory: int  # instructions that access local memory
    decay: bool = False  # with weight decay in the same pass


# --- Disassembly ---------------------------------------------------------------------------------


def find_tool(name: str = "cuobjdump") -> str:
    """Returns the path of a CUDA binary tool: on the PATH, or the one in the triton wheel."""
    found = shutil.which(name)
    if found:
        return found
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        shipped = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        if shipped.is_file():
            return str(shipped)
    raise SystemExit(f"{name} was found neither on the PATH nor in the triton wheel")


def dump(path: Path, arch: str, what: str) -> str:
    """Runs cuobjdump."""
    command = [find_tool(), what, "-arch", arch, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed: {result.stderr.strip()}")
    return result.stdout


def functions(listing: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Yields name and instructions of every kernel."""
    line = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
    for part in listing.split("Function : ")[1:]:
        name = part.split()[0]
        found = (line.match(text) for text in part.splitlines())
        yield (
            name,
            [
                Instruction(int(m[1], 16), (m[2] or "").strip(), m[3], m[4].strip())
                for m in found
                if m
            ],
        )


def resources(listing: str) -> dict[str, tuple[int, int]]:
    """Returns (registers, stack bytes) of every kernel."""
    found = re.findall(r"Function (\S+):\s*\n?\s*REG:(\d+) STACK:(\d+)", listing)
    return {name: (int(registers), int(stack)) for name, registers, stack in found}


# --- Control flow --------------------------------------------------------------------------------


def blocks_of(instructions: list[Instruction]) -> dict[int, Block]:
    """Splits a kernel into blocks, keyed by the address of their first instruction."""
    targets: dict[int, int] = {}
    for i in instructions:
        jump = re.search(r"0x([0-9a-f]+)\s*$", i.operands)
        if i.name.startswith("BRA") and jump:
            targets[i.address] = int(jump[1], 16)
    starts = {instructions[0].address, *targets.values()}
    for i, after in pairwise(instructions):
        if i.name.startswith(("BRA", "EXIT", "RET", "BRX")):
            starts.add(after.address)
    blocks: dict[int, Block] = {}
    for one in instructions:
        if one.address in starts:
            current = blocks[one.address] = Block([], [])
        current.instructions.append(one)
    order = list(blocks)
    for start, following in zip(order, [*order[1:], None], strict=True):
        last = blocks[start].instructions[-1]
        if last.address in targets:
            blocks[start].successors.append(targets[last.address])
        always = not last.guard and last.operands.startswith("0x")  # BRA with an operand may fall
        ends = last.name.startswith(("EXIT", "RET", "BRX")) and not last.guard
        falls = not ends and not (last.name.startswith("BRA") and always)
        if following is not None and falls:
            blocks[start].successors.append(following)
    return blocks


def shortest(blocks: dict[int, Block], start: int) -> dict[int, tuple[int, list[int]]]:
    """Fewest instructions from the end of a block to the end of every other (and of itself)."""
    best: dict[int, tuple[int, list[int]]] = {}
    queue: list[tuple[int, list[int]]] = [
        (len(blocks[s].instructions), [s]) for s in blocks[start].successors if s in blocks
    ]
    heapq.heapify(queue)
    while queue:
        length, path = heapq.heappop(queue)
        at = path[-1]
        if at in best:
            continue
        best[at] = (length, path)
        for s in blocks[at].successors:
            if s in blocks and s not in best:
                heapq.heappush(queue, (length + len(blocks[s].instructions), [*path, s]))
    return best


def hot_paths(blocks: dict[int, Block]) -> Iterator[list[Instruction]]:
    """Yields the loop around each 16-byte store: from the nearest arithmetic in front, and back."""
    stores = [a for a, b in blocks.items() if b.wide_stores()]
    bodies = [a for a, b in blocks.items() if b.count(*MATH) >= MIN_MATH]
    reach = {a: shortest(blocks, a) for a in {*stores, *bodies}}
    for store in stores:
        near = [
            (0 if body == store else reach[body][store][0], body)
            for body in bodies
            if store in reach[body] and body in reach[store]
        ]
        if not near:
            continue
        body = min(near)[1]
        cycle = reach[store][body][1] + ([] if body == store else reach[body][store][1])
        yield [i for a in cycle for i in blocks[a].instructions]


def term_paths(blocks: dict[int, Block]) -> Iterator[list[Instruction]]:
    """Yields the loops that one more term takes in a program of many."""
    seen: set[frozenset[int]] = set()
    for start, block in blocks.items():
        if block.count(*MATH) < MIN_MATH:
            continue
        back = shortest(blocks, start).get(start)
        if back is None or frozenset(back[1]) in seen:
            continue
        seen.add(frozenset(back[1]))
        path = [i for a in back[1] for i in blocks[a].instructions]
        # A pair of normals takes one conversion, 8 signs one load of a byte. any_block() holds half
        # as much, and the path that makes new signs stores them.
        made = 2 * sum(i.name.startswith("I2FP") for i in path)
        made += 8 * sum(i.name.startswith("LDS.U8") for i in path)
        adds = sum(i.name.startswith(("FADD", "FFMA")) for i in path)
        if made == HELD <= adds and not any(i.name.startswith(("STG", "STS")) for i in path):
            yield path


# --- Rows ----------------------------------------------------------------------------------------


def dtype_of(path: list[Instruction], strips: int) -> str:
    """Weight dtype of a hot path: float32 needs twice the stores, float16 a conversion on load."""
    if sum(map(is_wide_store, path)) > 2 * strips:
        return "float32"
    return "float16" if any(i.name.startswith("HADD2.F32") for i in path) else "bfloat16"


def rows(path: Path, arch: str) -> list[Row]:
    """Counts every add_noise kernel of a file."""
    used = resources(dump(path, arch, "-res-usage"))
    out = []
    for name, instructions in functions(dump(path, arch, "-sass")):
        match = re.search(r"add_noise\w*ILb([01])ELb([01])E\w*?(Single|Many)", name)
        if match is None:
            continue
        blocks = blocks_of(instructions)
        local = sum(i.name.startswith(("LDL", "STL")) for i in instructions)
        registers, stack = used.get(name, (0, 0))
        many = match[3] == "Many"
        found: list[Row] = []
        kept: list[Row] = []

        def row(
            hot: list[Instruction], terms: str, dtype: str, weights: int, m: re.Match[str] = match
        ) -> Row:
            return Row(
                kernel=f"add_noise/{m[3].lower()}",
                distribution="gaussian" if m[1] == "1" else "rademacher",
                rounding="stochastic" if m[2] == "1" else "nearest",
                terms=terms,
                dtype=dtype,
                weights=weights,
                slots=len(hot),
                slots_per_weight=round(len(hot) / weights, 2),
                registers=registers,  # noqa: B023
                stack_bytes=stack,  # noqa: B023
                local_memory=local,  # noqa: B023
            )

        for hot in hot_paths(blocks):
            dtype = dtype_of(hot, strips=1 if many else 2)
            weights = sum(map(is_wide_store, hot)) * (4 if dtype == "float32" else 8)
            found.append(row(hot, "besides terms" if many else "one", dtype, weights))
        if many:
            # One a dtype, nearly alike; longer ones go through the start or the end of a round.
            term = min(term_paths(blocks), key=len, default=None)
            found += [] if term is None else [row(term, "each term", "any", HELD)]
        found.sort(key=lambda r: (r.terms, r.dtype, r.slots))
        for r in found:
            # The loop of one term comes twice for each dtype: without decay, and with it.
            again = r.terms == "one" and any((o.terms, o.dtype) == ("one", r.dtype) for o in kept)
            kept.append(replace(r, decay=True) if again else r)
        out += kept
    return out


def main() -> int:
    """Prints the table; returns 1 when a kernel spills or exceeds its limit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    path = arguments.file
    if path is None:
        spec = importlib.util.find_spec("zorba_kernels._C")
        if spec is None or spec.origin is None:
            raise SystemExit("zorba_kernels._C is not built")
        path = Path(spec.origin)
    table = rows(path, arguments.arch)
    if not table:
        raise SystemExit(f"{path} holds no add_noise kernel for {arguments.arch}")
    failed = False
    heads = f"{'kernel':<17} {'noise':<10} {'rounding':<10} {'terms':<14} {'dtype':<8}"
    print(f"{heads} slots/weight regs")
    for r in table:
        plain = r.terms == "one" and r.dtype == "bfloat16" and not r.decay
        limit = LIMITS.get((r.distribution, r.rounding)) if plain else None
        over = limit is not None and r.slots_per_weight > limit
        spills = r.stack_bytes > 0 or r.local_memory > 0
        failed |= over or spills
        note = f"  over the limit of {limit}" if over else f"  (limit {limit})" if limit else ""
        note += "  with decay" if r.decay else ""
        note += "  SPILLS" if spills else ""
        print(
            f"{r.kernel:<17} {r.distribution:<10} {r.rounding:<10} {r.terms:<14} {r.dtype:<8} "
            f"{r.slots_per_weight:12.2f} {r.registers:4d}{note}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in table], indent=2) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
