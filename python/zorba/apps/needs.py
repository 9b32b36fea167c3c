"""Checks in front of a command, and how a command fails."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from typing import NoReturn


def fail(command: str, message: str, code: int = 1) -> NoReturn:
    """Ends a command with a sentence: ``zorba COMMAND: MESSAGE``, in red on a terminal."""
    sentence = f"zorba {command}: {message}"
    print(f"\033[31m{sentence}\033[0m" if sys.stderr.isatty() else sentence, file=sys.stderr)
    raise SystemExit(code)


def check_needs(command: str, packages: Iterable[str], extras: str) -> None:
    """Ends a command with what to install, where a package is missing.

    Args:
        command: that is run.
        packages: that it imports, by the names of their modules.
        extras: of this package that bring them, by commas.
    """
    # Looked up, not imported: the command imports what it needs once, and torch takes seconds.
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        fail(command, f"it needs {', '.join(missing)}: pip install 'zorba-kernels[{extras}]'")
