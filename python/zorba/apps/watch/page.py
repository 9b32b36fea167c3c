"""``zorba report``: a run as one HTML page that needs nothing else, not even a script."""

from __future__ import annotations

import io
import json
from base64 import b64encode
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from zorba.apps.cli import ReportSettings
from zorba.apps.watch import figures
from zorba.apps.watch.events import MAX_TEXT, Status, clean
from zorba.apps.watch.live import read_run
from zorba.apps.watch.state import RunState
from zorba.apps.watch.words import decimal, facts, status
from zorba.files import write_whole
from zorba.identity import package_version
from zorba.sizes import show_bytes

_CURVES = {
    "Loss": figures.loss_picture,
    "Scores": figures.scores_picture,
    "Traffic": figures.traffic_picture,
}
_MAPS = {
    "Activation map, coverage and memory": figures.activation_picture,
    "Status of each client": figures.status_picture,
}


def run_report(settings: ReportSettings) -> None:
    """Writes the page, and says where it is."""
    print(f"wrote {write_report(settings.run, settings.out)}")


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes the page of a run to ``out``, by default into its folder, and returns its path.

    Nothing of clients, configurations and files is markup in it, and its policy allows no script.
    Raises RunFolderError where there is no run, and OSError where the page cannot be written.
    """
    folder, state = read_run(run)
    try:
        summary = dict(json.loads(folder.summary.read_text()))
    except (OSError, TypeError, ValueError, RecursionError):  # the events alone make a page
        summary = {}
    environment = Environment(loader=PackageLoader("zorba.apps.watch"), autoescape=True)
    environment.filters |= {"size": show_bytes, "clock": _clock, "decimal": decimal}
    tables = {"Summary of the program": summary, "Settings": state.settings}
    tables["Machine of the server"] = state.machine
    plan, height = state.plan, 1.2 + 0.19 * min(len(state.clients), figures.MOST_ROWS)
    page = environment.get_template("page.html").render(
        state=state,
        status=status(state, datetime.now(timezone.utc)),
        facts=facts(state),
        curves=_draw(_CURVES, state, (4.3, 2.9)),
        maps=_draw(_MAPS, state, (11.0, height)),
        faults=sorted(state.faults.values(), key=lambda fault: -len(fault.rounds)),
        clients=sorted(state.clients.items(), key=lambda item: item[1].status < Status.NOT_USED),
        masks=dict(zip(plan.clients, plan.mask, strict=True)),
        memory=dict(zip(plan.clients, plan.memory, strict=False)),
        budgets=dict(zip(plan.clients, plan.budgets, strict=False)),
        tables={heading: _short_values(values) for heading, values in tables.items()},
        version=package_version(),
    )
    path = out or folder.report
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)
    return path


def _draw(
    pictures: Mapping[str, Callable[[Axes, RunState], str]],
    state: RunState,
    inches: tuple[float, float],
) -> list[tuple[str, str, str]]:
    """Returns name, image and caption of the pictures that have content."""
    found = []
    for name, draw in pictures.items():
        figure, file = Figure(figsize=inches, layout="constrained"), io.BytesIO()
        with figures.plain_text(), rc_context({"svg.fonttype": "none", "font.size": 9}):
            if caption := draw(figure.add_subplot(), state):
                figure.savefig(file, format="svg", transparent=True, dpi=150)
                # An image is inert, whatever its SVG holds, and keeps its ids for itself.
                encoded = b64encode(file.getvalue()).decode()
                found.append((name, f"data:image/svg+xml;base64,{encoded}", caption))
    return found


def _short_values(values: dict[str, Any]) -> dict[str, str]:
    """Returns the values that are a few words; longer ones, such as curves, are in pictures."""
    known = {name: str(value) for name, value in values.items() if value is not None}
    return {clean(name): clean(text) for name, text in known.items() if len(text) <= MAX_TEXT}


def _clock(time: datetime | None) -> str:
    return "never" if time is None else f"{time.astimezone(timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
