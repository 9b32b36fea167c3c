"""``zorba watch``: shows a run of this or another process."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from zorba.apps.watch.live import LiveView
from zorba.apps.watch.state import Follower, RunState
from zorba.apps.watch.terminal import RunView
from zorba.federated.errors import RunFolderError
from zorba.federated.run_folder import RunFolder


def read_run(path: Path) -> tuple[RunFolder, RunState]:
    """Returns a run's folder, and the state that its events add up to.

    Args:
        path: of the folder, or of its ``events.jsonl``.

    Raises:
        RunFolderError: there is no run, or its events cannot be read.
    """
    folder = RunFolder(path.parent if path.name == "events.jsonl" else path)
    if not folder.events.is_file():
        raise RunFolderError(
            f"there is no run at {path}: expected a folder with events.jsonl, as a server writes it"
        )
    return folder, Follower(folder.events).update()


def watch_run(path: Path, console: Console | None = None, once: bool = False) -> None:
    """Shows a run until it ends or Ctrl-C is pressed.

    Args:
        path: of the folder.
        console: to show it on; None for the standard output.
        once: show the state of now, and return.

    Raises:
        RunFolderError: there is no run, or its events cannot be read.
    """
    console = console or Console()
    folder, state = read_run(path)
    if once:
        console.print(RunView(state, rows=len(state.clients) or None))
        return
    try:
        with LiveView(folder.events, console) as view:
            view.ended.wait()
        if view.error is not None:
            raise view.error
    except KeyboardInterrupt:
        console.print("no longer watching; the run goes on", highlight=False)
