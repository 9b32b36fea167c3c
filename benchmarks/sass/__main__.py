"""Counts the installed kernels and compares them with what was recorded."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tyro

from benchmarks.sass import pipes
from benchmarks.sass.disassembly import assembler, assembler_of, find_tool
from benchmarks.sass.recorded import Recorded, cuda_slots, failures, limit_of, notes
from benchmarks.sass.rows import ARCH, Row, cuda_rows, triton_rows

Counted = tuple[list[Row], dict[str, str]]  # rows, and the version of the compiler by backend
LEGEND = f"""
bound: cycles of a scheduler a weight, by its slots or its busiest pipe (see pipes.py).
of mem.: the bound, of the time that an H200's memory takes: at {pipes.HERTZ / 1e9} GHz and \
{pipes.BYTES_A_SECOND / 1e12} TB/s, {pipes.budget("bfloat16"):.1f} cycles a 16-bit weight and \
twice that a float32 one.
each: one more term in the same pass. signs: its share of making those of a batch."""


def count_cuda() -> Counted | str:
    """Rows of the installed extension; or why there are none."""
    spec = importlib.util.find_spec("zorba_kernels._C")
    if spec is None or spec.origin is None:
        return "zorba_kernels._C is not built"
    path = Path(spec.origin)
    with tempfile.TemporaryDirectory() as folder:
        try:
            rows, version = cuda_rows(path), assembler_of(path, ARCH, Path(folder))
        except RuntimeError as error:  # no cuobjdump, or it found no device code at all
            return str(error)
    if not rows:
        return f"{path} holds no add_noise kernel for {ARCH} (see ZORBA_CUDA and ZORBA_CUDA_ARCHS)"
    return rows, {"cuda": f"ptxas {version}"}


def count_triton() -> Counted | str:
    """Rows of the Triton kernels and of tl.randn; or why there are none."""
    if importlib.util.find_spec("triton") is None or find_tool() is None:
        return "triton is not installed, or has no cuobjdump"
    from benchmarks.sass import triton_code

    kernels = [*triton_code.add_noise(), triton_code.peer()]
    made = f"triton {triton_code.triton.__version__}, ptxas "
    versions = {about["backend"]: made + assembler(cubin) for cubin, about in kernels}
    with ThreadPoolExecutor(2) as pool:  # it is cuobjdump that takes time
        counted = pool.map(lambda kernel: triton_rows(kernel[0], **kernel[1]), kernels)
        return [row for rows in counted for row in rows], versions


def lines(rows: list[Row], recorded: Recorded) -> Iterator[str]:
    """Yields a line for each row, between a head and an explanation."""
    busy = "".join(f"{pipe:>8}" for pipe in pipes.PIPES)
    yield f"{'slots a weight, and how many of them each pipe takes':68}{'slots':>7}{busy}" + (
        f"{'bound':>8}{'of mem.':>8}{'regs':>5}{'recorded':>9}"
    )
    for row in rows:
        counts = "".join(f"{n / row.weights:8.2f}" for n in row.pipes.values())
        yield (
            f"{row.name:68}{row.slots_per_weight:7.2f}{counts}{row.bound:8.2f}"
            f"{row.bound / pipes.budget(row.dtype):8.0%}{row.registers:5d}"
            f"{recorded.slots.get(row.name, ''):>9}  {remarks(row, rows, recorded)}"
        )
    yield LEGEND


def remarks(row: Row, rows: list[Row], recorded: Recorded) -> str:
    """Limits, and how the backends compare."""
    limit = limit_of(row) if row.backend == "cuda" else None
    cuda = cuda_slots(row, rows, recorded) if row.backend != "cuda" else None
    found = [
        f"limit {limit:g}" if limit is not None else "",
        f"{row.slots_per_weight / cuda:.2f} x cuda" if cuda is not None else "",
        "SPILLS" if row.spills else "",
    ]
    return ", ".join(filter(None, found))


def main(record: bool = False) -> int:
    """Counts issue slots a weight of the GPU kernels; ends with 1 when something is wrong.

    Args:
        record: Write recorded.json instead of comparing with it.
    """
    rows: list[Row] = []
    versions: dict[str, str] = {}
    for name, counted in (("cuda", count_cuda()), ("triton", count_triton())):
        if isinstance(counted, str):
            print(f"{name} was not counted: {counted}")
        else:
            rows += counted[0]
            versions |= counted[1]
    if not rows:
        return 1
    recorded = Recorded.load()
    print("\n".join(lines(rows, recorded)))
    if record:
        recorded = recorded.updated(rows, versions)
        recorded.save()
    wrong = failures(rows, versions, recorded)
    print("\n".join(["", *notes(versions, recorded), *(f"FAILED {what}" for what in wrong)]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
