"""``zorba report``: a run as one HTML page that needs nothing else, not even a script."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from zorba.apps.watch.command import read_run
from zorba.apps.watch.curves import loss_picture, scores_picture, traffic_picture
from zorba.apps.watch.fields import clean, decimal, duration, metric, size, table
from zorba.apps.watch.maps import (
    activation_picture,
    bytes_picture,
    coverage_picture,
    memory_picture,
    timeline_picture,
)
from zorba.apps.watch.records import Status
from zorba.apps.watch.state import RunState
from zorba.federated.run_folder import RunFolder
from zorba.files import write_whole
from zorba.identity import package_version

_MOST_TABLE_ROWS = 500

_SECTIONS = (
    (
        "Over the rounds",
        (("Loss", loss_picture), ("Scores", scores_picture), ("Traffic", traffic_picture)),
    ),
    ("Activation map and coverage", (("", activation_picture),)),
    ("Coverage over the rounds", (("", coverage_picture),)),
    ("Memory", (("", memory_picture),)),
    ("Traffic of each client", (("", bytes_picture),)),
    ("What each client did", (("", timeline_picture),)),
)


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

    Whatever a client, a configuration or a file says stands in it as text: nothing of it is
    markup, and the page's policy allows no script and no request.

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
    environment.filters |= {"size": size, "clock": _clock, "decimal": decimal}
    sections = []
    for heading, pictures in _SECTIONS:
        drawn = [(name, *draw(state)) for name, draw in pictures]
        there = [entry for entry in drawn if entry[1]]
        if there:
            sections.append((heading, there))
    mood, status = _status(state, now or datetime.now(timezone.utc))
    faults = sorted(state.faults, key=lambda fault: -len(fault.rounds))
    clients = sorted(state.clients.items(), key=lambda item: item[1].status < Status.UNUSED)
    blocks = {
        name: int(n)
        for name, n in zip(state.plan.clients, state.plan.mask.sum(axis=1), strict=True)
    }
    return environment.get_template("page.html").render(
        title=f"Federation {state.job or 'without a name'}",
        mood=mood,
        status=status,
        tiles=_tiles(state),
        sections=sections,
        faults=faults[:_MOST_TABLE_ROWS],
        more_faults=max(0, len(faults) - _MOST_TABLE_ROWS),
        clients=[
            (name, client, blocks.get(name, ""), client.status.words if state.rounds else "waiting")
            for name, client in clients[:_MOST_TABLE_ROWS]
        ],
        more_clients=max(0, len(clients) - _MOST_TABLE_ROWS),
        tables=_tables(state, summary or {}),
        footer=f"Made by zorba-kernels {package_version()} from the events of the run"
        + (f"; {state.damaged} damaged lines were passed over." if state.damaged else "."),
    )


def _status(state: RunState, now: datetime) -> tuple[str, str]:
    """Returns how the run stands: good, warn or bad, and a sentence."""
    if not state.starts:
        return "warn", "No server has started this run."
    if state.problem:
        return "bad", f"Stopped after round {state.round}: {state.problem}"
    if state.end is None:
        words = f"Round {state.round} of {state.last_round} is done, and no end was written: "
        silence = state.silence(now)
        if silence is None:
            return "good", words + "the run is under way."
        return "warn", words + f"it waits or was killed. The last event is {duration(silence)} old."
    if not state.end.get("replicas_identical"):
        return "bad", f"Ended after round {state.round}, and the replicas are not all identical."
    return "good", f"Ended after round {state.round}, all replicas identical."


def _tiles(state: RunState) -> list[tuple[str, str, str]]:
    """Returns name, figure and note of what one wants to know first."""
    tiles = [("rounds", f"{state.round:,} of {max(state.last_round, state.round):,}", "")]
    first, last = state.starts[0][0] if state.starts else None, state.last_event
    if first and last:
        pace = f"{duration(state.pace)} a round lately" if state.pace is not None else ""
        tiles.append(("took", duration((last - first).total_seconds()), pace))
    losses = [r.loss for r in state.rounds if r.loss is not None]
    if losses:
        tenth = max(1, len(losses) // 10)
        start, end = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
        note = "first and last tenth of the rounds" if tenth > 1 else "first and last round"
        tiles.append(("loss", f"{decimal(start)} → {decimal(end)}", note))
    for name in list(dict.fromkeys(n for _, s in state.evaluations for n in s))[:3]:
        scores = [(at, s[name]) for at, s in state.evaluations if name in s]
        (first_at, before), (last_at, after) = scores[0], scores[-1]
        title = "evaluation loss" if name == "loss" else metric(name)
        if len(scores) == 1:
            tiles.append((title, decimal(before), f"after round {first_at}"))
        else:
            note = f"after rounds {first_at} and {last_at}"
            tiles.append((title, f"{decimal(before)} → {decimal(after)}", note))
    measured = sum(c.rounds_measured for c in state.clients.values())
    if state.rounds:
        asked = max(1, sum(r.asked for r in state.rounds))
        up, down = (sum(getattr(r, f"bytes_{w}") for r in state.rounds) for w in ("up", "down"))
        for way, total, count in (("up", up, measured), ("down", down, asked)):
            figure = f"{total / max(1, count):,.0f} B"
            tiles.append((f"{way}, a client and round", figure, f"{size(total)} in all"))
        answered = f"{measured / asked:.1%} of what was asked was measured"
        tiles.append(("clients", f"{len(state.clients):,}", answered))
    if state.end is not None and not state.problem:
        values = sorted(set(map(clean, table(state.end, "fingerprints").values())))
        same = state.end.get("replicas_identical") and len(values) == 1
        tiles.append(("fingerprints", "equal" if same else "NOT equal", ", ".join(values[:4])))
    count = sum(len(fault.rounds) for fault in state.faults)
    kinds = f"{len(state.faults)} kinds, see below" if len(state.faults) > 1 else ""
    tiles.append(("faults", f"{count:,}", kinds))
    return tiles


def _tables(state: RunState, summary: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns heading, and names and values, of each table of facts."""
    facts = {
        "Summary of the program": summary,
        "Settings": state.settings,
        "Machine of the server": state.machine,
    }
    found = [(heading, _pairs(values)) for heading, values in facts.items()]
    return [(heading, rows) for heading, rows in found if rows]


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the values that are a few words; lists of rounds and the like are in pictures."""
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
