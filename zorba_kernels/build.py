"""What was compiled into this installation."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from zorba_kernels.noise import NOISE_VERSION
from zorba_kernels.program import PackedProgram


@cache
def extension() -> tuple[Any, str | None]:
    """Returns the compiled module ``_C`` and None, or None and why it cannot be used."""
    # A missing or broken part is no error at import: the reference serves, and says so.
    try:
        compiled = importlib.import_module("zorba_kernels._C")
    except ImportError as error:
        return None, (
            f"the compiled part is missing or broken ({error}); install the package with a C++ "
            "compiler present: pip install ."
        )
    # A stale extension would make other noise under the same version number.
    if compiled.noise_version != NOISE_VERSION:
        return None, (
            f"the compiled part has noise version {compiled.noise_version}, the Python part "
            f"{NOISE_VERSION}: build the package again"
        )
    # A program crosses the binding as an address: another layout would be read as another program.
    fields = len(PackedProgram.ARRAYS) + len(PackedProgram.NUMBERS)
    if getattr(compiled, "program_fields", None) != fields:
        return None, (
            f"the compiled part is of another build than the Python part, which packs programs in "
            f"{fields} fields: build the package again"
        )
    return compiled, None


def build_info() -> dict[str, Any]:
    """Returns what was built.

    Keys: ``compiled`` (bool), ``reason`` (why not, or None), ``noise_version``, ``compiler``,
    ``cpu_isas`` (instruction sets that were built and that this processor runs, best first) and
    ``cuda`` (whether the CUDA part was built).
    """
    compiled, reason = extension()
    isas = ("avx512", "avx2", "baseline")
    return {
        "compiled": compiled is not None,
        "reason": reason,
        "noise_version": NOISE_VERSION,
        "compiler": compiled.compiler if compiled else None,
        "cpu_isas": [isa for isa in isas if compiled.cpu_runs(isa)] if compiled else [],
        "cuda": compiled.cuda if compiled else False,
    }
