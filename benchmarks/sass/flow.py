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
from dataclasses import dataclass
from itertools import count, pairwise

from benchmarks.sass.disassembly import Instruction

MATH = ("FFMA", "FADD", "FMUL", "LOP3", "IMAD", "PRMT", "SHF", "F2FP", "IADD3", "R2P")
MIN_MATH = 24  # instructions of arithmetic that make a block worth calling the body of a loop
JUMPS = ("BRA", "BRX", "JMP", "EXIT", "RET")
ENDS = ("EXIT", "RET", "BRX")  # nothing follows that this reads

Path = list[Instruction]


@dataclass
class Block:
    """Instructions that run one after the other."""

    instructions: list[Instruction]
    successors: list[int]  # addresses of first instructions

    @property
    def is_body(self) -> bool:
        """Whether there is enough arithmetic to be the body of a loop."""
        return sum(i.opcode in MATH for i in self.instructions) >= MIN_MATH

    @property
    def stored_bytes(self) -> int:
        """What a lane stores to global memory here."""
        return sum(i.stored_bytes for i in self.instructions)

    @property
    def exits(self) -> bool:
        """Whether a lane may leave the kernel here."""
        return any(i.opcode == "EXIT" for i in self.instructions)


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
    """The instructions of some blocks, in that order."""
    return [i for a in addresses for i in blocks[a].instructions]


def shortest(blocks: Blocks, start: int) -> dict[int, tuple[int, list[int]]]:
    """Fewest instructions from the end of a block to the end of every other (and of itself)."""
    best: dict[int, tuple[int, list[int]]] = {}
    queue = [(len(blocks[s].instructions), [s]) for s in blocks[start].successors]
    heapq.heapify(queue)
    while queue:
        length, path = heapq.heappop(queue)
        at = path[-1]
        if at in best:
            continue
        best[at] = (length, path)
        for s in blocks[at].successors:
            if s not in best:
                heapq.heappush(queue, (length + len(blocks[s].instructions), [*path, s]))
    return best


class Reach:
    """Shortest ways between the blocks of a kernel, found when asked for."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self.ways: dict[int, dict[int, tuple[int, list[int]]]] = {}

    def way(self, start: int, end: int) -> tuple[int, list[int]] | None:
        """Slots and blocks from the end of a block to the end of another, if there is a way."""
        if start not in self.ways:
            self.ways[start] = shortest(self.blocks, start)
        return self.ways[start].get(end)

    def tour(self, stops: list[int]) -> tuple[int, list[int]] | None:
        """Slots and blocks of the shortest way along some blocks, without the first of them."""
        total, path = 0, []
        for start, end in pairwise(stops):
            way = self.way(start, end)
            if way is None:
                return None
            total += way[0]
            path += way[1]
        return total, path


def store_blocks(blocks: Blocks) -> list[int]:
    """Blocks with 16-byte stores or, if there are none, with any stores to global memory."""
    wide = [a for a, b in blocks.items() if any(i.is_wide_store for i in b.instructions)]
    return wide or [a for a, b in blocks.items() if b.stored_bytes]


def store_loops(blocks: Blocks, inner: list[list[int]]) -> list[Path]:
    """The loop around each store: from the nearest way through some blocks, and back.

    ``inner`` lists the ways that count as work, by blocks that are passed in that order. A loop
    that passes the store of another (of another dtype) is taken only if there is no other.
    """
    reach, stores = Reach(blocks), store_blocks(blocks)
    found = []
    for store in stores:
        tours = []
        for stops in inner:
            work = stops if stops[-1] == store else [*stops, store]
            to_store, cycle = reach.tour(work), reach.tour([store, *work])
            if to_store and cycle:
                passed = len({*cycle[1]} & {*stores})
                tours.append((passed, to_store[0], cycle[1]))
        if tours:
            found.append(instructions_of(blocks, min(tours)[2]))
    return found


def straight_path(blocks: Blocks, inner: list[list[int]]) -> Path:
    """From entry to exit, by the shortest way through some blocks: of those that store the most.

    For kernels without a store in a loop; a loop that stores nothing is passed as fast as it can.
    """
    entry, reach = next(iter(blocks)), Reach(blocks)
    ways = [reach.tour(stops if stops[0] == entry else [entry, *stops]) for stops in inner]
    start = [entry, *min((way for way in ways if way), default=(0, []))[1]]
    order = count()  # among equals, the first found
    stored = sum(blocks[a].stored_bytes for a in start)
    queue = [(len(instructions_of(blocks, start)), next(order), stored, start)]
    seen: set[tuple[int, int]] = set()
    found: list[tuple[int, int, list[int]]] = []
    while queue:
        length, _, stored, path = heapq.heappop(queue)
        at = path[-1]
        if (at, stored) in seen:
            continue
        seen.add((at, stored))
        if blocks[at].exits:
            found.append((-stored, length, path))
        for s in blocks[at].successors:
            if blocks[s].stored_bytes and s in path:
                raise ValueError("the kernel stores in a loop without arithmetic")
            more = stored + blocks[s].stored_bytes
            length_of = len(blocks[s].instructions)
            heapq.heappush(queue, (length + length_of, next(order), more, [*path, s]))
    if not found or min(found)[0] == 0:
        raise ValueError("no path from entry to exit stores anything")
    return instructions_of(blocks, min(found)[2])


def hot_paths(blocks: Blocks) -> list[Path]:
    """The loops around stores and the arithmetic in front of them, or else the straight path."""
    bodies = [[a] for a, b in blocks.items() if b.is_body]
    return store_loops(blocks, bodies) or [straight_path(blocks, [])]
