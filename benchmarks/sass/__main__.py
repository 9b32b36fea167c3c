"""Counts the installed kernels and compares them with what was recorded."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import sass
from benchmarks.sass import report
from benchmarks.sass.disassembly import assembler_of, find_tool
from benchmarks.sass.recorded import Recorded, failures, notes
from benchmarks.sass.rows import ARCH, Row, cuda_rows, triton_rows

Counted = tuple[list[Row], dict[str, str]]  # rows, and the version of the compiler by backend


def count_cuda(path: Path | None = None) -> Counted | str:
    """Rows of a file, the installed extension by default; or why there are none."""
    if find_tool() is None:
        return "cuobjdump is neither on the PATH nor in a triton wheel"
    if path is None:
        spec = importlib.util.find_spec("zorba_kernels._C")
        if spec is None or spec.origin is None:
            return "zorba_kernels._C is not built"
        path = Path(spec.origin)
    with tempfile.TemporaryDirectory() as folder:
        try:
            rows, version = cuda_rows(path), assembler_of(path, ARCH, Path(folder))
        except RuntimeError as error:  # cuobjdump says so when there is no device code at all
            return str(error)
    if not rows:
        return f"{path} holds no add_noise kernel for {ARCH} (see ZORBA_CUDA and ZORBA_CUDA_ARCHS)"
    return rows, {"cuda": f"ptxas {version}"}


def count_triton() -> Counted | str:
    """Rows of the Triton kernels and of tl.randn; or why there are none."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if find_tool() is None:
        return "cuobjdump is neither on the PATH nor in the triton wheel"
    from benchmarks.sass import triton_code

    peer, ours = triton_code.peer(), triton_code.add_noise()
    with ThreadPoolExecutor(2) as pool:  # it is cuobjdump that takes time
        found = list(pool.map(lambda one: list(triton_rows([one])), ours))
    rows = [row for some in found for row in some]
    rows += triton_rows([peer], backend="peer")
    versions = {"triton": triton_code.versions(ours[0]), "peer": triton_code.versions(peer)}
    return rows, versions


def main() -> int:
    """Prints the table; returns 1 when something is wrong with it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sass", description=(sass.__doc__ or "").split("\n")[0]
    )
    parser.add_argument("file", nargs="?", type=Path, help="count only this one")
    parser.add_argument("--record", action="store_true", help="write recorded.json")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    parts = {"cuda": count_cuda(arguments.file)}
    if arguments.file is None:
        parts["triton"] = count_triton()
    rows: list[Row] = []
    versions: dict[str, str] = {}
    for name, counted in parts.items():
        if isinstance(counted, str):
            print(f"{name} was not counted: {counted}")
        else:
            rows += counted[0]
            versions |= counted[1]
    if not rows:
        return 1
    recorded = Recorded.load()
    print("\n".join(report.lines(rows, recorded)))
    if arguments.json:
        arguments.json.write_text(json.dumps([r.describe() for r in rows], indent=2) + "\n")
    if arguments.record:
        recorded = recorded.updated(rows, versions)
        recorded.save()
    wrong = failures(rows, versions, recorded)
    print("\n".join(["", *notes(versions, recorded), *(f"FAILED {what}" for what in wrong)]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
