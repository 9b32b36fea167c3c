"""Control flow of a kernel, and its hot paths.

The hot path of a kernel with a loop is the shortest cycle through a store of weights and the
arithmetic in front of it: what one round of the loop issues when no weight needs a slow path. A
kernel without such a loop (most Triton kernels: a program handles one tile) is counted from its
entry to its exit, along the shortest of the paths that store the most.

A predicated instruction takes its slot whether its predicate holds or not.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.sass.disassembly import Instruction

MATH = ("FFMA", "FADD", "FMUL", "LOP3", "IMAD", "PRMT", "SHF", "F2FP", "IADD3")
MIN_MATH = 24  # instructions of arithmetic that make a block worth calling the body of a loop
JUMPS = ("BRA", "BRX", "JMP", "EXIT", "RET")
ENDS = ("EXIT", "RET", "BRX")  # nothing follows that this reads

Path = list[Instruction]
Walk = tuple[int, list[int]]  # number of instructions, and addresses of blocks


@dataclass
class Block:
    """Instructions that run one after the other."""

    instructions: list[Instruction]
    successors: list[int]  # addresses of first instructions

    @property
    def stored_bytes(self) -> int:
        return sum(i.stored_bytes for i in self.instructions)


Blocks = dict[int, Block]


def blocks_of(instructions: list[Instruction]) -> Blocks:
    """Splits a kernel into blocks, keyed by the address of their first instruction."""
    targets: dict[int, int] = {}
    for i in instructions:
        jump = re.search(r"0x([0-9a-f]+)\s*$", i.operands)
        if i.opcode == "BRA" and jump:
            targets[i.address] = int(jump[1], 16)
    starts = {instructions[0].address, *targets.values()}
    starts |= {after.address for i, after in pairwise(instructions) if i.opcode in JUMPS}
    blocks: Blocks = {}
    for one in instructions:
        if one.address in starts:
            current = blocks[one.address] = Block([], [])
        current.instructions.append(one)
    order = list(blocks)
    for start, following in zip(order, [*order[1:], None], strict=True):
        last = blocks[start].instructions[-1]
        target = targets.get(last.address)
        if target in blocks:
            blocks[start].successors.append(target)
        # A BRA whose operands begin with a predicate may fall through, as one with a guard.
        jumps = last.opcode == "BRA" and last.operands.startswith("0x")
        always = not last.guard and (jumps or last.opcode in ENDS)
        if following is not None and not always:
            blocks[start].successors.append(following)
    return blocks


def instructions_of(blocks: Blocks, addresses: list[int]) -> Path:
    return [i for a in addresses for i in blocks[a].instructions]


def walks(
    blocks: Blocks, starts: list[int], state: Callable[[list[int]], Hashable]
) -> Iterator[Walk]:
    """Yields the shortest walk from one of the starts into every state, the shortest first."""
    queue = [(len(blocks[s].instructions), [s]) for s in starts]
    heapq.heapify(queue)
    seen: set[Hashable] = set()
    while queue:
        length, path = heapq.heappop(queue)
        if (here := state(path)) in seen:
            continue
        seen.add(here)
        yield length, path
        for s in blocks[path[-1]].successors:
            heapq.heappush(queue, (length + len(blocks[s].instructions), [*path, s]))


def shortest(blocks: Blocks, start: int) -> dict[int, Walk]:
    """Fewest instructions from the end of a block to the end of every other (and of itself)."""
    found = walks(blocks, blocks[start].successors, lambda path: path[-1])
    return {walk[1][-1]: walk for walk in found}


def store_loops(blocks: Blocks) -> Iterator[Path]:
    """Yields the loop around each store: from the nearest arithmetic in front of it, and back."""
    wide = [a for a, b in blocks.items() if any(i.is_wide_store for i in b.instructions)]
    stores = wide or [a for a, b in blocks.items() if b.stored_bytes]
    math = {a: sum(i.opcode in MATH for i in b.instructions) for a, b in blocks.items()}
    bodies = [a for a, count in math.items() if count >= MIN_MATH]
    reach = {a: shortest(blocks, a) for a in {*stores, *bodies}}
    for store in stores:
        near = [
            (0 if body == store else reach[body][store][0], body)
            for body in bodies
            if store in reach[body] and body in reach[store]
        ]
        if near:
            body = min(near)[1]
            to_store = [] if body == store else reach[body][store][1]
            yield instructions_of(blocks, reach[store][body][1] + to_store)


def quiet_loops(blocks: Blocks) -> list[Path]:
    """The shortest loop through each block that has arithmetic, of those that store nothing."""
    math = {a: sum(i.opcode in MATH for i in b.instructions) for a, b in blocks.items()}
    stores = [a for a, b in blocks.items() if b.stored_bytes]
    quiet = {
        a: Block(b.instructions, [s for s in b.successors if s not in stores])
        for a, b in blocks.items() if a not in stores
    }  # fmt: skip
    bodies = [a for a in quiet if math[a] >= MIN_MATH]
    around = {a: shortest(quiet, a).get(a) for a in bodies}
    return [instructions_of(quiet, walk[1]) for walk in around.values() if walk is not None]


def straight_path(blocks: Blocks) -> Path:
    """From entry to exit: the shortest of the paths that store the most.

    For kernels without a store in a loop; a loop that stores nothing is passed as fast as it can.
    """

    def stored(path: list[int]) -> int:
        return sum(blocks[a].stored_bytes for a in path)

    found: list[tuple[int, int, list[int]]] = []
    for length, path in walks(blocks, [next(iter(blocks))], lambda path: (path[-1], stored(path))):
        if blocks[path[-1]].stored_bytes and path[-1] in path[:-1]:
            raise ValueError("the kernel stores in a loop without arithmetic")
        if any(i.opcode == "EXIT" for i in blocks[path[-1]].instructions):
            found.append((-stored(path), length, path))
    if not found or min(found)[0] == 0:
        raise ValueError("no path from entry to exit stores anything")
    return instructions_of(blocks, min(found)[2])


def hot_paths(blocks: Blocks) -> list[Path]:
    """The loops around stores and the arithmetic in front of them, or else the straight path."""
    return list(store_loops(blocks)) or [straight_path(blocks)]
