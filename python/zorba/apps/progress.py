"""The terminal: our console and bars, and the libraries' bars out of sight.

rich is imported where it is used: settings and ``--help`` do without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn


def plain_console(stderr: bool = False) -> Console:
    """Returns a console that shows text as it is: a path may have [brackets] in its name."""
    from rich.console import Console

    return Console(markup=False, highlight=False, stderr=stderr)


def hide_library_bars() -> None:
    """Keeps the bars that transformers draws while it loads out of what is shown."""
    from transformers.utils import logging

    silence: Any = logging
    silence.disable_progress_bar()


def progress_bar(
    console: Console, note: str = "left", time: ProgressColumn | None = None
) -> Progress:
    """Returns a bar with what is done of a total, a note, and the time that is left.

    Args:
        console: where it is drawn.
        note: text in front of the time; ``{task.fields[note]}`` for one that changes.
        time: column that takes the place of the time that is left.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(note, markup=False),
        time or TimeRemainingColumn(),
        console=console,
    )
