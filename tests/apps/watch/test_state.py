"""What the events of a run add up to."""

from __future__ import annotations

import io
import random
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from zorba.apps.watch import Follower, RunState, Status
from zorba.apps.watch.fields import clean
from zorba.apps.watch.page import render_page
from zorba.apps.watch.terminal import RunView
from zorba.apps.watch.words import decimal, duration, usual_range

from tests.apps.watch.runs import HOSTILE, Run


def test_clients_rounds_and_coverage(tmp_path: Path, draw: random.Random) -> None:
    run = Run(tmp_path, ["ada", "bob", "cleo"], 6, 3, draw)
    run.round(1)
    run.round(2, failures={"bob": "OSError: gone"}, away=["cleo"])
    run.round(3, refusals={"ada": "ada has diverged"})
    run.writer.write("memory", {"bytes": {"bob": 1000}})
    state = Follower(tmp_path / "events.jsonl").update()
    ada, bob, cleo = (state.clients[name] for name in run.names)
    assert list(ada.history) == [Status.MEASURED, Status.MEASURED, Status.REFUSED]
    assert list(bob.history) == [Status.MEASURED, Status.FAILED, Status.MEASURED]
    assert list(cleo.history) == [Status.MEASURED, Status.SITS_OUT, Status.MEASURED]
    assert (ada.status, ada.reason) == (Status.REFUSED, "ada has diverged")
    assert (ada.last_round, ada.rounds_measured, ada.rounds_failed) == (2, 2, 1)
    assert (ada.bytes_up, ada.bytes_down) == (3 * 82, 3 * 234)
    assert (bob.bytes_up, bob.measured_bytes, ada.measured_bytes) == (2 * 82, 1000, None)
    assert ada.last_seen == state.rounds[2].time
    assert cleo.last_seen == state.rounds[2].time
    mask = np.array(run.mask, dtype=int)
    for r, rows in zip(state.rounds, ([0, 1, 2], [0], [1, 2]), strict=True):
        assert r.coverage.tolist() == mask[rows].sum(axis=0).tolist()
    assert state.plan.mask.tolist() == mask.tolist()
    assert [r.asked for r in state.rounds] == [3, 2, 3]
    assert state.round == 3
    assert state.end is None
    run.end()


def test_faults_that_differ_in_numbers_are_one(tmp_path: Path, draw: random.Random) -> None:
    run = Run(tmp_path, ["ada", "bob"], 2, 40, draw)
    for t in range(1, 41):
        run.round(t, failures={"bob": f"answered after {t}.5 s, round {t}, 0x{t:016x}"})
    state = Follower(tmp_path / "events.jsonl").update()
    (fault,) = state.faults
    assert fault.rounds == list(range(1, 41))
    assert fault.text.startswith("answered after 40.5 s")
    assert fault.last == state.rounds[-1].time


def test_starts_plans_and_ends(tmp_path: Path, draw: random.Random) -> None:
    follower = Follower(tmp_path / "events.jsonl")
    assert follower.update().round == 0, "before there is a file"
    run = Run(tmp_path, ["ada"], 2, 9, draw)
    run.round(1)
    run.start(1)
    run.writer.write("fault", {"text": "the disk is slow", "client": None, "round": None})
    run.plan = {"clients": ["ada", "dan"], "blocks": ["x", "y"], "mask": ["10", "01"]}
    run.writer.write("replan", {"round": 1, "reason": "dan came", "plan": run.plan})
    run.writer.write("lost", {"events": 4})
    run.writer.write("a kind of a later version", {"round": "?"})
    run.names = ["ada", "dan"]
    run.round(2)
    state = follower.update()
    assert [fault.text for fault in state.faults] == [
        "the server started again, after no end was written",
        "the disk is slow",
        "new plan: dan came",
        "4 events could not be written: the disk was full",
    ]
    assert list(state.clients["dan"].history) == [Status.SITS_OUT, Status.MEASURED]
    assert state.rounds[1].coverage.tolist() == [1, 1]
    run.writer.write("end", {"problem": "LogError: no space left"})
    run.start(2)
    state = follower.update()
    assert state.problem == ""
    assert [fault.text for fault in state.faults][-2:] == [
        "ended: LogError: no space left",
        "the server went on",
    ]
    run.end(failures={"dan": "gone"})
    state = follower.update()
    assert state.faults[-1].text == "at the end: gone"
    # Another run takes the folder.
    (tmp_path / "events.jsonl").unlink()
    Run(tmp_path, ["eve"], 1, 1, draw)
    assert list(follower.update().clients) == ["eve"]


def test_replies_that_were_not_used(tmp_path: Path, draw: random.Random) -> None:
    run = Run(tmp_path, ["ada", "bob"], 2, 2, draw)
    run.round(1, clients=[], losses={}, loss=None, problem="coefficients overflow: set clip")
    run.round(2, clients=["ada"])
    state = Follower(tmp_path / "events.jsonl").update()
    assert list(state.clients["ada"].history) == [Status.NOT_USED, Status.MEASURED]
    assert list(state.clients["bob"].history) == [Status.NOT_USED, Status.JOINED]
    assert state.rounds[0].loss is None
    assert state.faults[0].text.startswith("coefficients overflow")


VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    10**400,
    1e999,
    "x",
    [],
    ["a", 1],
    {"a": "b"},
    {"ada": None},
)


@pytest.mark.parametrize(
    "kind", ["start", "round", "evaluation", "memory", "fault", "replan", "end"]
)
def test_fields_of_any_type_break_nothing(kind: str, draw: random.Random) -> None:
    keys = (
        "round", "last_round", "loss", "seconds", "clients", "losses", "bytes_up", "bytes_down",
        "failures", "refusals", "problem", "plan", "settings", "machine", "time", "bytes", "text",
        "client", "reason", "events", "accuracy", "fingerprints", "job",
    )  # fmt: skip
    state = RunState()
    plan = {"clients": ["ada", "a"], "blocks": ["x", "y"], "mask": ["10", "01"]}
    state.apply({"event": "start", "plan": {**plan, "budgets": [9, 9], "memory": [8, 8]}})
    for _ in range(300):
        event = {key: draw.choice(VALUES) for key in keys if draw.random() < 0.6}
        if draw.random() < 0.3:
            event["plan"] = {
                key: draw.choice(VALUES)
                for key in ("clients", "blocks", "mask", "budgets", "memory")
            }
        state.apply({**event, "event": kind})
        state.silence(datetime.now(timezone.utc))
    assert "</html>" in render_page(state)
    Console(file=io.StringIO(), width=80).print(RunView(state))


@pytest.mark.parametrize("text", HOSTILE)
def test_clean_text_is_one_line_that_can_be_shown(text: str) -> None:
    shown = clean(text)
    assert shown.isprintable()
    shown.encode()
    assert len(shown) == len(text)


def test_figures_in_words() -> None:
    seconds = (-1, 0.312, 42.4, 185, 7800, 3 * 86400 + 4 * 3600)
    words = ["0.00 s", "0.31 s", "42 s", "0:03:05", "2:10:00", "3 days, 4:00:00"]
    assert [duration(s) for s in seconds] == words
    assert [decimal(x) for x in (0.7, 99999, 3e38)] == ["0.700", "99999.000", "3.00e+38"]


def test_the_usual_range_leaves_out_what_is_far_from_all_others(draw: random.Random) -> None:
    values = [draw.gauss(0.7, 0.05) for _ in range(draw.randint(3, 400))]
    assert usual_range(values) == (min(values), max(values))
    low, high = usual_range([*values, 3e38, -3e38])
    assert -20 < low <= min(values)
    assert max(values) <= high < 20
    assert usual_range([0.0]) == (0.0, 0.0)
    assert usual_range([5.0, 6.0]) == (5.0, 6.0)
    assert usual_range([234.0] * 50 + [1e6])[1] == 468.0
