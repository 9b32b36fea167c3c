"""``zorba report``: a run as one HTML page that needs nothing else, not even a script."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from zorba.apps.watch import figures, maps
from zorba.apps.watch.fields import clean
from zorba.apps.watch.live import read_run
from zorba.apps.watch.records import Status
from zorba.apps.watch.state import RunState
from zorba.apps.watch.svg import draw_svg
from zorba.apps.watch.words import decimal, facts, status
from zorba.federated.run_folder import RunFolder
from zorba.files import write_whole
from zorba.identity import package_version
from zorba.sizes import show_bytes

_MOST_TABLE_ROWS = 500
_CURVES = {
    "Loss": figures.loss_picture,
    "Scores": figures.scores_picture,
    "Traffic": figures.traffic_picture,
}
_MAPS = {
    "Activation map, coverage and memory": maps.activation_picture,
    "Coverage over the rounds": maps.coverage_picture,
    "Status of each client": maps.status_picture,
}


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes the page of a run, and returns its path.

    Args:
        run: folder of the run, which may be under way.
        out: path of the page; ``report.html`` in the folder where it is None.

    Raises:
        RunFolderError: there is no run, or its events cannot be read.
        OSError: the page cannot be written.
    """
    folder, state = read_run(run)
    page = render_page(state, summary=_read_summary(folder))
    path = out or folder.report
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)
    return path


def render_page(
    state: RunState, summary: Mapping[str, Any] | None = None, now: datetime | None = None
) -> str:
    """Returns the page of a run.

    Texts of clients, configurations and files stand in it as text: nothing of them is markup, and
    the page's policy allows no script and no request.

    Args:
        state: of the run, at any time of it.
        summary: of the program that ran it, by name.
        now: for the age of a run that has not ended; None for the present.
    """
    environment = Environment(
        loader=PackageLoader("zorba.apps.watch"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": show_bytes, "clock": _clock, "decimal": decimal}
    mood, sentence = status(state, now or datetime.now(timezone.utc))
    tables = {
        "Summary of the program": summary or {},
        "Settings": state.settings,
        "Machine of the server": state.machine,
    }
    return environment.get_template("page.html").render(
        state=state,
        title=f"Federation {state.job or 'without a name'}",
        mood=mood,
        status=sentence,
        facts=facts(state),
        sections=_sections(state),
        faults=sorted(state.faults, key=lambda fault: -len(fault.rounds)),
        clients=sorted(state.clients.items(), key=lambda item: item[1].status < Status.NOT_USED),
        active=dict(zip(state.plan.clients, state.plan.mask.sum(axis=1).tolist(), strict=True)),
        most=_MOST_TABLE_ROWS,
        tables={heading: _pairs(values) for heading, values in tables.items()},
        version=package_version(),
    )


def _sections(state: RunState) -> dict[str, list[tuple[str, Markup, str]]]:
    """Returns title, picture and caption of each picture that has content, by heading."""
    curves = [(name, *draw_svg(draw, state, name, (4.3, 2.9))) for name, draw in _CURVES.items()]
    sections = {"Over the rounds": [curve for curve in curves if curve[1]]}
    for heading, draw in _MAPS.items():
        rows = state.plan.blocks if draw is maps.coverage_picture else state.clients
        height = 1.2 + 0.19 * min(len(rows), maps.MOST_ROWS)
        picture, caption = draw_svg(draw, state, heading, (11.0, height))
        sections[heading] = [("", picture, caption)] if picture else []
    return sections


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the values that are a few words; longer ones, such as curves, are in pictures."""
    rows = []
    for name, value in values.items():
        if isinstance(value, list) and len(value) <= 16:
            value = ", ".join(map(str, value))
        if isinstance(value, float):
            value = f"{value:.6g}"
        if value is None or isinstance(value, str | int):
            rows.append((clean(name), "none" if value is None else clean(value)))
    return rows


def _read_summary(folder: RunFolder) -> dict[str, Any]:
    """Returns ``summary.json``; an empty summary where there is none, or no object."""
    try:
        content = json.loads(folder.summary.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _clock(time: datetime | None) -> str:
    return "never" if time is None else f"{time.astimezone(timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
