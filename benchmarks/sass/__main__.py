"""Counts the installed kernels and compares them with what was recorded."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tyro

from benchmarks.sass import disassembly, pipes
from benchmarks.sass.rows import Counted, Recorded, Row, cuda_rows, triton_rows

LEGEND = f"""
bound: cycles of a scheduler a weight, by its slots or its busiest pipe (see pipes.py).
of mem.: the bound, of the time that an H200's memory takes: at {pipes.HERTZ / 1e9} GHz and \
{pipes.BYTES_A_SECOND / 1e12} TB/s, {pipes.budget("bfloat16"):.1f} cycles a 16-bit weight and \
twice that a float32 one."""


def count_cuda() -> Counted | str:
    """Rows of the installed extension; or why there are none."""
    spec = importlib.util.find_spec("zorba_kernels._C")
    if spec is None or spec.origin is None:
        return "zorba_kernels._C is not built"
    path = Path(spec.origin)
    try:
        kernels = disassembly.disassemble(path, disassembly.ARCH)
        version = disassembly.assembler_of(path)
    except RuntimeError as error:  # no cuobjdump, or it found no device code at all
        return str(error)
    rows = [row for code in kernels for row in cuda_rows(code)]
    if not rows:
        there = f"{path} holds no add_noise kernel for {disassembly.ARCH}"
        return f"{there} (see ZORBA_CUDA and ZORBA_CUDA_ARCHS)"
    return Counted(rows, kernels, {"cuda": f"ptxas {version}"})


def count_triton() -> Counted | str:
    """Rows of the Triton kernels and of tl.randn; or why there are none."""
    if importlib.util.find_spec("triton") is None or disassembly.find_tool() is None:
        return "triton is not installed, or has no cuobjdump"
    from benchmarks.sass import triton_code

    compiled = [*triton_code.kernels(), triton_code.peer()]
    made = f"triton {triton_code.triton.__version__}, ptxas "
    versions = {about["backend"]: made + disassembly.assembler(cubin) for cubin, about in compiled}
    with ThreadPoolExecutor(2) as pool:  # it is cuobjdump that takes time
        kernels = list(pool.map(disassembly.disassemble_cubin, [cubin for cubin, _ in compiled]))
    found = zip(kernels, compiled, strict=True)
    rows = [row for code, (_, about) in found for row in triton_rows(code, **about)]
    return Counted(rows, kernels[:-1], versions)  # the last is tl.randn


def lines(rows: list[Row], recorded: Recorded) -> Iterator[str]:
    busy = "".join(f"{pipe:>8}" for pipe in pipes.PIPES)
    yield f"{'slots a weight, and how many of them each pipe takes':54}{'slots':>7}{busy}" + (
        f"{'bound':>8}{'of mem.':>8}{'regs':>5}{'recorded':>9}{'limit':>7}{'x CUDA':>8}"
    )
    for row in rows:
        counts = "".join(f"{n / row.weights:8.2f}" for n in row.pipes.values())
        limit = recorded.limit_of(row, rows)
        yield (
            f"{row.name:54}{row.slots_per_weight:7.2f}{counts}{row.bound:8.2f}"
            f"{row.bound / pipes.budget(row.dtype):8.0%}{row.registers:5d}"
            f"{recorded.slots.get(row.name, ''):>9}{'' if limit is None else f'{limit:.4g}':>7}"
            f"{row.slots_per_weight / recorded.cuda_slots(row, rows):8.2f}"
        )
    yield LEGEND


def main(record: bool = False) -> int:
    """Counts issue slots a weight of the GPU kernels; ends with 1 when something is wrong.

    Args:
        record: Write recorded.json instead of comparing with it.
    """
    counted = Counted([], [], {})
    for name, found in (("cuda", count_cuda()), ("triton", count_triton())):
        if isinstance(found, str):
            print(f"{name} was not counted: {found}")
        else:
            rows, kernels, versions = counted
            counted = Counted(rows + found.rows, kernels + found.kernels, versions | found.versions)
    if not counted.rows:
        return 1
    recorded = Recorded.load()
    print("\n".join(lines(counted.rows, recorded)))
    if record:
        recorded = recorded.updated(counted)
        recorded.save()
    wrong = [f"FAILED {what}" for what in recorded.failures(counted)]
    print("\n".join(["", *recorded.notes(counted.versions), *wrong]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
