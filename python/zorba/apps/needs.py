"""What a command needs beside the package, and how it fails."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import NoReturn

import typer


def fail(command: str, message: str) -> NoReturn:
    """Ends a command with a sentence in red: ``zorba COMMAND: MESSAGE``."""
    typer.secho(f"zorba {command}: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(1)


def check_needs(command: str, packages: Iterable[str], extras: str) -> None:
    """Ends a command with what to install, where a package is missing.

    Args:
        command: that is run.
        packages: that it imports, by the names of their modules.
        extras: of this package that bring them, by commas.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        fail(command, f"it needs {', '.join(missing)}: pip install 'zorba-kernels[{extras}]'")
