"""The loop over the terms of a program: what one more term costs a weight.

It is recognised by what it does, not by how: it adds to values that it carries from one round to
the next, and stores no weight. So it does not matter where signs come from, nor how many terms a
round takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.sass.disassembly import Instruction, register
from benchmarks.sass.flow import Blocks, Path, instructions_of, shortest

PHILOX_PRODUCTS = 20  # two products of 64 bits in each of ten rounds
BATCH_PRODUCTS = 60  # wide products in the block where a lane makes signs for several terms


def additions(path: Path) -> dict[int, int]:
    """Registers that a round of a loop adds terms to, and how many of them.

    A weight's sum is a register whose value after the round comes from its value before it by
    additions: FADD, or FFMA by its addend. ``@P FADD`` and ``@!P FADD`` of one register, which add
    a coefficient with either sign, are one addition in two slots.
    """
    # Of each register that was written: the registers that its value began in, and terms since.
    origins: dict[int, dict[int, int]] = {}
    last: dict[int, tuple[str, int]] = {}  # guard of what was added last, and when it was written
    written: dict[str, int] = {}  # when a predicate was last written
    for at, i in enumerate(path):
        target = next((r for r in map(register, i.arguments[:2]) if r is not None), None)
        if target is not None and not i.opcode.startswith("ST"):
            added, kept = addends(i), carried(i)
            since = written.get(i.guard.lstrip("@!"), -1)
            opposite = "@" + i.guard[2:] if i.guard.startswith("@!") else "@!" + i.guard[1:]
            if i.guard and target in added and last.get(target) == (opposite, since):
                kept = [target]  # the other sign of an addition that counts already
            terms = 0 if kept else 1
            merged: dict[int, int] = {}
            for source in kept or added:
                for origin, n in origins.get(source, {source: 0}).items():
                    merged[origin] = max(merged.get(origin, 0), n + terms)
            # An instruction writes up to four registers, from its first operand on.
            wide = 4 if "128" in i.suffixes else 2 if {"64", "WIDE"} & {*i.suffixes} else 1
            origins.update({target + k: {} for k in range(1, wide)})
            origins[target], last[target] = merged, (i.guard, since)
        written.update(dict.fromkeys(i.arguments[:2], at))
        if i.opcode == "R2P":
            written = {f"P{p}": at for p in range(7)}
    sums = {name: began.get(name, 0) for name, began in origins.items()}
    return {name: terms for name, terms in sums.items() if terms}


def addends(i: Instruction) -> list[int]:
    """Registers that an instruction adds something to."""
    by = {"FADD": i.arguments[1:3], "FFMA": i.arguments[3:4]}.get(i.opcode, [])
    return [r for r in map(register, by) if r is not None]


def carried(i: Instruction) -> list[int]:
    """Registers one of whose values an instruction passes on as it is."""
    move = i.opcode == "MOV" or i.name.startswith("IMAD.MOV")
    by = i.arguments[-1:] if move else i.arguments[1:3] if i.opcode in ("SEL", "FSEL") else []
    return [r for r in map(register, by) if r is not None]


@dataclass(frozen=True)
class Loop:
    """A loop over terms."""

    path: Path
    added: int  # terms times weights, a round and lane

    @property
    def slots_per_weight(self) -> float:
        """Issue slots for one term."""
        return len(self.path) / self.added

    @property
    def makes_noise(self) -> bool:
        """Whether there is a whole call of Philox on the path."""
        products = (i for i in self.path if i.opcode == "IMAD" and {"WIDE", "HI"} & {*i.suffixes})
        return sum(1 for _ in products) >= PHILOX_PRODUCTS


def term_loops(blocks: Blocks, least: int) -> list[Loop]:
    """Loops that add at least so many terms times weights a round."""
    found: dict[frozenset[int], Loop] = {}
    for start, block in blocks.items():
        back = shortest(blocks, start).get(start) if block.is_body else None
        if back is None or frozenset(back[1]) in found:
            continue
        path = instructions_of(blocks, back[1])
        loop = Loop(path, sum(additions(path).values()))
        if loop.added >= least and not any(i.stored_bytes for i in path):
            found[frozenset(back[1])] = loop
    return list(found.values())


def wide_products(path: Path) -> int:
    return sum("WIDE" in i.name for i in path)


def sign_batch(blocks: Blocks, loop: Path) -> Path | None:
    """What a warp issues to make the signs of a batch of terms, on top of the loop over them.

    From the loop to the block that makes them, through it twice (a batch takes two rounds of it),
    and back; None where signs are not made in batches.
    """
    start = loop[0].address
    from_loop = shortest(blocks, start)
    for body, block in blocks.items():
        if wide_products(block.instructions) >= BATCH_PRODUCTS and body in from_loop:
            from_body = shortest(blocks, body)
            if body in from_body and start in from_body:
                there, again, back = from_loop[body][1], from_body[body][1], from_body[start][1]
                return instructions_of(blocks, [*there, *again, *back[:-1]])
    return None
