"""The loop over the terms of a program: what one more term costs a weight.

It is recognised by what it does, not by how: it adds to values that it carries from one round to
the next, and stores no weight. So it does not matter where signs come from, nor how many terms a
round takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.sass.disassembly import Instruction, register
from benchmarks.sass.flow import Block, Blocks, Path, instructions_of, shortest

PHILOX_PRODUCTS = 20  # two products of 64 bits in each of ten rounds

Origins = dict[int, int]  # register that a value began in: terms added to it since


@dataclass
class Sums:
    """Follows additions along a path, from the values that registers had at its beginning."""

    origins: dict[int, Origins] = field(default_factory=dict)
    last: dict[int, tuple[str, int]] = field(default_factory=dict)  # guard of the last addition
    written: dict[str, int] = field(default_factory=dict)  # when a predicate was last written

    def of(self, source: int) -> Origins:
        """What a register's value is a sum of."""
        return self.origins.get(source, {source: 0})

    def follow(self, at: int, i: Instruction) -> None:
        """Takes one instruction into account, the one with number ``at``."""
        target = next((r for r in map(register, i.arguments[:2]) if r is not None), None)
        if target is not None and not i.opcode.startswith("ST"):
            added, kept = addends(i), carried(i)
            guard = (i.guard, self.written.get(i.guard.lstrip("@!"), -1))
            other = (opposite(i.guard), guard[1])
            if i.guard and target in added and self.last.get(target) == other:
                kept = [target]  # the other sign of an addition that counts already
            terms = 0 if kept else 1
            merged: Origins = {}
            for source in kept or added:
                for origin, n in self.of(source).items():
                    merged[origin] = max(merged.get(origin, 0), n + terms)
            for k in range(1, results(i)):
                self.origins[target + k] = {}
            self.origins[target] = merged
            self.last[target] = guard
        for argument in i.arguments[:2]:
            self.written[argument] = at
        if i.opcode == "R2P":
            self.written = {f"P{p}": at for p in range(7)}


def additions(path: Path) -> dict[int, int]:
    """Registers that a round of a loop adds terms to, and how many of them.

    A weight's sum is a register whose value after the round comes from its value before it by
    additions: FADD, or FFMA by its addend. ``@P FADD`` and ``@!P FADD`` of one register, which add
    a coefficient with either sign, are one addition in two slots.
    """
    sums = Sums()
    for at, instruction in enumerate(path):
        sums.follow(at, instruction)
    added = {name: origins.get(name, 0) for name, origins in sums.origins.items()}
    return {name: terms for name, terms in added.items() if terms}


def opposite(guard: str) -> str:
    """The guard that holds where this one does not."""
    return "@" + guard[2:] if guard.startswith("@!") else "@!" + guard[1:]


def addends(i: Instruction) -> list[int]:
    """Registers that an instruction adds something to."""
    by = {"FADD": i.arguments[1:3], "FFMA": i.arguments[3:4]}.get(i.opcode, [])
    return [r for r in map(register, by) if r is not None]


def carried(i: Instruction) -> list[int]:
    """Registers one of whose values an instruction passes on as it is."""
    move = i.opcode == "MOV" or i.name.startswith("IMAD.MOV")
    by = i.arguments[-1:] if move else i.arguments[1:3] if i.opcode in ("SEL", "FSEL") else []
    return [r for r in map(register, by) if r is not None]


def results(i: Instruction) -> int:
    """How many registers an instruction writes, from its first operand on."""
    suffixes = i.name.split(".")
    return 4 if "128" in suffixes else 2 if "64" in suffixes or "WIDE" in suffixes else 1


def makes_noise(path: Path) -> bool:
    """Whether there is a whole call of Philox on the path."""
    products = (i for i in path if i.opcode == "IMAD" and {"WIDE", "HI"} & {*i.name.split(".")})
    return sum(1 for _ in products) >= PHILOX_PRODUCTS


@dataclass(frozen=True)
class Loop:
    """A loop over terms."""

    path: Path
    added: int  # terms times weights, a round and lane

    @property
    def slots_per_weight(self) -> float:
        """Issue slots for one term."""
        return len(self.path) / self.added


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


BATCH_PRODUCTS = 60  # wide products in the block where a lane makes signs for several terms


def sign_batch(blocks: Blocks, loop: Path) -> Path | None:
    """What a warp issues to make the signs of a batch of terms, on top of the loop over them.

    From the loop to the block that makes them, through it twice (a batch takes two rounds of it),
    and back; None where signs are not made in batches.
    """
    start = loop[0].address
    making = [a for a, b in blocks.items() if _wide_products(b) >= BATCH_PRODUCTS]
    from_loop = shortest(blocks, start)
    for body in making:
        from_body = shortest(blocks, body)
        if body in from_loop and body in from_body and start in from_body:
            there, again, back = from_loop[body][1], from_body[body][1], from_body[start][1]
            return instructions_of(blocks, [*there, *again, *back[:-1]])
    return None


def _wide_products(block: Block) -> int:
    return sum("WIDE" in i.name for i in block.instructions)
