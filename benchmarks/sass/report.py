"""The table that ``make sass`` prints."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.sass import pipes
from benchmarks.sass.recorded import Recorded, cuda_slots, limit_of
from benchmarks.sass.rows import Row

HEAD = (
    f"{'':7}{'kernel':17}{'noise':11}{'rounding':11}{'terms':16}{'dtype':9}{'decay':6}"
    f"{'slots':>7}{'fma':>7}{'alu':>6}{'imad':>6}{'xu':>6}{'mem.':>6}{'tensor':>7}{'other':>6}"
    f"{'bound':>7}{'of mem.':>8}{'regs':>5}{'recorded':>9}"
)


def lines(rows: list[Row], recorded: Recorded) -> Iterator[str]:
    """Yields a line for each row, between a head and an explanation."""
    half, whole = pipes.budget("bfloat16"), pipes.budget("float32")
    yield HEAD
    for row in rows:
        per_weight = row.pipes_per_weight
        counts = "".join(f"{n:{7 if p == 'tensor' else 6}.2f}" for p, n in per_weight.items())
        before = recorded.slots.get(row.key)
        yield (
            f"{row.backend:7}{row.kernel:17}{row.distribution:11}{row.rounding:11}{row.terms:16}"
            f"{row.dtype:9}{'yes' if row.decay else 'no':6}{row.slots_per_weight:7.2f} {counts}"
            f"{row.bound:7.2f}{row.bound / pipes.budget(row.dtype):8.0%}{row.registers:5d}"
            f"{'' if before is None else format(before, '.2f'):>9}{remarks(row, rows, recorded)}"
        )
    yield ""
    yield "slots: instructions issued a weight, and how many of them each pipe takes."
    yield "bound: cycles of a scheduler a weight, by its slots or its busiest pipe (see pipes.py)."
    yield (
        f"of mem.: the bound, of the time that an H200's memory takes: at {pipes.HERTZ / 1e9} GHz "
        f"and {pipes.BYTES_A_SECOND / 1e12} TB/s, {half:.1f} cycles a 16-bit weight and "
        f"{whole:.1f} a float32 one."
    )
    yield "each: one more term in the same pass. signs: its share of making those of a batch."


def remarks(row: Row, rows: list[Row], recorded: Recorded) -> str:
    """Limits, and how the backends compare."""
    found = []
    limit = limit_of(row) if row.backend == "cuda" else None
    if limit is not None:
        found.append(f"limit {limit:g}")
    cuda = cuda_slots(row, rows, recorded) if row.backend != "cuda" else None
    if cuda is not None:
        found.append(f"{row.slots_per_weight / cuda:.2f} x cuda")
    if row.spills:
        found.append("SPILLS")
    return "  " + ", ".join(found) if found else ""
