"""What the events of a run add up to."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from zorba.apps.watch import Follower, Status
from zorba.apps.watch.events import clean
from zorba.apps.watch.words import decimal, duration

from tests.apps.watch.runs import HOSTILE, Run


def test_clients_and_rounds(tmp_path: Path, draw: random.Random) -> None:
    run = Run(tmp_path, ["ada", "bob", "cleo"], 6, 3, draw)
    follower = Follower(tmp_path / "events.jsonl")
    happens: list[tuple[dict[str, Any], list[int]]] = [
        ({}, [0, 1, 2]),
        ({"failures": {"bob": "OSError: gone"}, "away": ["cleo"]}, [0]),
        ({"refusals": {"ada": "ada has diverged"}}, [1, 2]),
    ]
    for number, (what, rows) in enumerate(happens, 1):
        run.round(number, **what)
        covered = [sum(column) for column in zip(*(run.mask[n] for n in rows), strict=True)]
        assert follower.update().coverage == covered
    state = follower.state
    ada, bob, cleo = (state.clients[name] for name in run.names)
    assert list(ada.history) == [Status.MEASURED, Status.MEASURED, Status.REFUSED]
    assert list(bob.history) == [Status.MEASURED, Status.FAILED, Status.MEASURED]
    assert list(cleo.history) == [Status.MEASURED, Status.SITS_OUT, Status.MEASURED]
    assert (ada.status, ada.reason) == (Status.REFUSED, "ada has diverged")
    assert (ada.last_round, ada.rounds_measured, ada.rounds_failed) == (2, 2, 1)
    assert (ada.bytes_up, ada.bytes_down, bob.bytes_up) == (3 * 82, 3 * 234, 2 * 82)
    assert ada.last_seen == cleo.last_seen == state.rounds[2].time
    assert [(r.asked, r.bytes_up, r.bytes_down) for r in state.rounds] == [
        (asked, used * 82, asked * 234) for asked, used in ((3, 3), (2, 1), (3, 3))
    ]
    assert (state.round, state.end) == (3, None)


def test_faults_that_differ_in_numbers_are_one(tmp_path: Path, draw: random.Random) -> None:
    run = Run(tmp_path, ["ada", "bob"], 2, 40, draw)
    for t in range(1, 41):
        run.round(t, failures={"bob": f"answered after {t}.5 s, round {t}, 0x{t:016x}"})
    state = Follower(tmp_path / "events.jsonl").update()
    (fault,) = state.faults.values()
    assert fault.rounds == list(range(1, 41))
    assert fault.text.startswith("answered after 40.5 s")
    assert fault.last == state.rounds[-1].time


def test_starts_and_ends(tmp_path: Path, draw: random.Random) -> None:
    follower = Follower(tmp_path / "events.jsonl")
    assert follower.update().round == 0, "before there is a file"
    run = Run(tmp_path, ["ada"], 2, 9, draw)
    run.round(1)
    run.names = ["ada", "dan"]
    run.plan = {"clients": run.names, "blocks": ["x", "y"], "mask": ["10", "01"]}
    run.start(1)
    run.writer.write("fault", {"text": "the disk is slow", "client": None, "round": None})
    run.writer.write("lost", {"events": 4})
    run.writer.write("a kind of a later version", {"what": "?"})
    run.round(2)
    state = follower.update()
    assert list(state.clients["dan"].history) == [Status.SITS_OUT, Status.MEASURED]
    assert state.coverage == [1, 1]
    run.writer.write("end", {"problem": "LogError: no space left"})
    run.start(2)
    run.end(failures={"dan": "gone"})
    assert [fault.text for fault in follower.update().faults.values()] == [
        "the server started again, after no end was written",
        "the disk is slow",
        "4 events could not be written: the disk was full",
        "ended: LogError: no space left",
        "the server went on",
        "at the end: gone",
    ]
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
    assert next(iter(state.faults.values())).text.startswith("coefficients overflow")


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("start", {"plan": {"clients": ["ada"], "blocks": ["x"], "mask": ["1", "1"]}}),
        ("start", {"plan": {"clients": ["ada"], "blocks": ["x"], "mask": ["\x1b"]}}),
        ("start", {"plan": {"memory": [-1]}}),
        ("round", {"round": -1}),
        ("round", {"losses": {"ada": "low"}}),
        ("round", {"bytes_up": {"ada": 1 << 64}}),
        ("round", {"clients": "ada"}),
        ("evaluation", {"accuracy": 10**400}),
        ("end", {"fingerprints": [1]}),
        ("end", {"time": "noon"}),
        ("end", {"time": None}),
    ],
)
def test_an_event_with_fields_of_other_types_is_damaged(
    tmp_path: Path, draw: random.Random, kind: str, fields: dict[str, Any]
) -> None:
    run = Run(tmp_path, ["ada"], 1, 2, draw)
    run.writer.write(kind, fields)
    run.round(1)
    state = Follower(tmp_path / "events.jsonl").update()
    assert (state.damaged, state.round, len(state.starts), state.end) == (1, 1, 1, None)
    assert not state.evaluations


@pytest.mark.parametrize("text", HOSTILE)
def test_clean_text_is_one_line_that_can_be_shown(text: str) -> None:
    shown = clean(text)
    assert shown.isprintable()
    shown.encode()
    assert len(shown) == len(text)
    assert len(clean(text * 500)) == 500


def test_figures_in_words() -> None:
    seconds = (-1, 0.312, 42.4, 185, 7800, 3 * 86400 + 4 * 3600)
    words = ["0 s", "0.31 s", "42 s", "0:03:05", "2:10:00", "3 days, 4:00:00"]
    assert [duration(s) for s in seconds] == words
    assert [decimal(x) for x in (0.7, 99999, 3e38)] == ["0.700", "99999.000", "3.00e+38"]
