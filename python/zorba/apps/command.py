"""What the commands share: options, checks, consoles, and how a command fails."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from tyro.constructors import PrimitiveConstructorSpec

# rich is imported where it is used: settings and ``--help`` do without it.
if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


@dataclass(frozen=True)
class Command:
    """A subcommand: settings, whose fields are its options, and the function that takes them."""

    settings: type
    function: str  # "module:function" of zorba.apps
    extras: str  # of this package, by commas, that bring the packages
    packages: tuple[str, ...]  # that the command imports, by the names of their modules

    def run(self, name: str, settings: Any) -> None:
        """Calls the function; where a package is missing, ends and says what to install."""
        # Looked up, not imported: the command imports what it needs once, and torch takes seconds.
        missing = [p for p in self.packages if importlib.util.find_spec(p) is None]
        if missing:
            install = f"run pip install '.[{self.extras}]' in a clone of zorba-kernels"
            fail(name, f"it needs {', '.join(missing)}: {install}")
        # The module is imported when the command runs: ``zorba --help`` must not wait for torch,
        # and works where the packages are not installed.
        module, _, function = self.function.partition(":")
        getattr(importlib.import_module(f"zorba.apps.{module}"), function)(settings)


def fail(command: str, message: str, code: int = 1) -> NoReturn:
    """Ends a command with a sentence: ``zorba COMMAND: MESSAGE``, in red on a terminal."""
    sentence = f"zorba {command}: {message}"
    print(f"\033[31m{sentence}\033[0m" if sys.stderr.isatty() else sentence, file=sys.stderr)
    raise SystemExit(code)


def by_commas(parse: Callable[[str], Any], metavar: str) -> PrimitiveConstructorSpec[Any]:
    """Annotates a field that ``parse`` makes of one argument; its ValueError ends the command."""
    # tyro itself takes an argument for each value, as --words a b.
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda arguments: parse(arguments[0]),
        is_instance=lambda value: isinstance(value, tuple | dict),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


def check_at_least(settings: Any, **least: int) -> None:
    """Refuses settings, with a ValueError, where a number is below its least; None is no number."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and value < bound:
            raise ValueError(f"{name} is {value}; expected at least {bound}")


def plain_console() -> Console:
    """Returns a console that shows text as it is: a path may have [brackets] in its name."""
    from rich.console import Console

    return Console(markup=False, highlight=False)


def print_table(console: Console, title: str, rows: Iterable[tuple[str, ...]]) -> None:
    """Prints rows of a name, a figure and perhaps a note."""
    from rich.table import Table

    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def progress_bar(console: Console) -> Progress:
    """Returns a bar with what is done of a total, a note (a task's field) and the time left."""
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[note]}", markup=False),
        progress.TimeRemainingColumn(),
        console=console,
    )


def hide_library_bars() -> None:
    """Keeps the bars that transformers draws while it loads out of what is shown."""
    from transformers.utils import logging

    silence: Any = logging
    silence.disable_progress_bar()
