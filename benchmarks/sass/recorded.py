"""The counts that this version is known to have, and what a count must not exceed.

recorded.json is written by ``python -m benchmarks.sass --record``. Another compiler than the one it
names may count otherwise; the same 10 % apply, because what matters is the code that it makes.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.sass.rows import Row

FILE = Path(__file__).with_name("recorded.json")
TOLERANCE = 1.10
TRITON_TO_CUDA = 1.3
LIMITS = {  # slots a weight of the CUDA kernels: bfloat16, one term, no decay
    ("gaussian", "nearest"): 26.0,
    ("gaussian", "stochastic"): 32.0,
    ("rademacher", "nearest"): 7.0,
}
RECORD = "if that is meant, run: python -m benchmarks.sass --record"


@dataclass(frozen=True)
class Recorded:
    """The contents of recorded.json."""

    versions: dict[str, str]  # of the compilers, by backend
    slots: dict[str, float]  # a weight, by name of the row

    @classmethod
    def load(cls, file: Path = FILE) -> Recorded:
        return cls(**json.loads(file.read_text())) if file.is_file() else cls({}, {})

    def save(self, file: Path = FILE) -> None:
        file.write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")

    def updated(self, rows: list[Row], versions: dict[str, str]) -> Recorded:
        """With other rows for the backends that were counted."""
        kept = {n: slots for n, slots in self.slots.items() if backend_of(n) not in versions}
        counted = {row.name: row.slots_per_weight for row in rows}
        return Recorded({**self.versions, **versions}, {**kept, **counted})


def backend_of(name: str) -> str:
    """Returns the backend of a row, which its name begins with."""
    return name.split()[0]


def limit_of(row: Row) -> float | None:
    """Returns the most slots that a CUDA kernel may take, where there is such a limit."""
    return LIMITS.get((row.distribution, row.rounding)) if row.is_plain else None


def cuda_slots(row: Row, rows: list[Row], recorded: Recorded) -> float | None:
    """Fewest slots of a CUDA kernel that does the same; recorded ones where none was counted."""
    counted = {r.name: r.slots_per_weight for r in rows if r.backend == "cuda"}
    known = counted or recorded.slots
    kernel = "single" if row.terms == "one" else "many"
    same = [f"cuda add_noise/{kernel} {row.work(dtype)}" for dtype in (row.dtype, "any")]
    return min((known[name] for name in same if name in known), default=None)


def failures(rows: list[Row], versions: dict[str, str], recorded: Recorded) -> list[str]:
    """Everything that is wrong with some rows.

    ``versions`` are the compilers, by backend: only the rows of these are expected to be there.
    """
    found = []
    for row in rows:
        if row.backend == "peer":  # not ours to improve
            continue
        if row.spills:
            found.append(
                f"{row.name}: spills ({row.stack_bytes} bytes of stack, {row.local_accesses} "
                "accesses of local memory); expected none: hold less in registers"
            )
        found += over_limit(row, rows, recorded)
        found += over_recorded(row, versions, recorded)
    for name, times in Counter(row.name for row in rows).items():
        if times > 1:
            found.append(f"{name}: {times} hot paths look alike; expected one: see rows.py")
    for name in sorted(recorded.slots.keys() - {row.name for row in rows}):
        if backend_of(name) in versions and backend_of(name) != "peer":
            found.append(f"{name}: recorded, but not found in the machine code; {RECORD}")
    return found


def over_limit(row: Row, rows: list[Row], recorded: Recorded) -> list[str]:
    """The limits that do not depend on what was recorded."""
    limit, said = limit_of(row), ""
    if limit is not None and row.backend == "triton":
        cuda = cuda_slots(row, rows, recorded)
        if cuda is None:
            return [f"{row.name}: there is no CUDA count to compare with; {RECORD}"]
        limit, said = TRITON_TO_CUDA * cuda, f"{TRITON_TO_CUDA} x CUDA's {cuda}"
    if limit is None or row.slots_per_weight <= limit:
        return []
    return [f"{row.name}: {row.slots_per_weight} slots a weight; the limit is {said or limit}"]


def over_recorded(row: Row, versions: dict[str, str], recorded: Recorded) -> list[str]:
    """What a row's own record says of it."""
    before = recorded.slots.get(row.name)
    if before is None:
        return [f"{row.name}: found in the machine code, but not recorded; {RECORD}"]
    if row.slots_per_weight <= TOLERANCE * before:
        return []
    then, now = recorded.versions.get(row.backend, "unknown"), versions[row.backend]
    return [
        f"{row.name}: {row.slots_per_weight} slots a weight, recorded are {before} "
        f"(+{row.slots_per_weight / before - 1:.0%}, 10 % are allowed; compiled by {now}, "
        f"recorded with {then}); {RECORD}"
    ]


def notes(versions: dict[str, str], recorded: Recorded) -> list[str]:
    """Compilers other than the recorded ones."""
    return [
        f"note: {backend} was compiled by {now}, recorded with {recorded.versions[backend]}"
        for backend, now in versions.items()
        if recorded.versions.get(backend, now) != now
    ]
