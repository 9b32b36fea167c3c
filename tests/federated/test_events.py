"""Events of a run: what is written is read, whatever a kill or a full disk leaves of the file."""

from __future__ import annotations

import json
import random
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zorba.federated import (
    EventReader,
    EventWriter,
    RoundReport,
    RunFolder,
    RunFolderError,
    RunRecorder,
)

from tests.federated.world import BLOCKS, MASKS, NAMES, World, fail


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.clear()
    return made


def read(path: Path) -> list[dict[str, Any]]:
    return EventReader(path).poll()


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in events]


def write(path: Path, *names: str) -> None:
    writer = EventWriter(path)
    for name in names:
        writer.write(name)
    writer.close()


def test_round_trip(path: Path) -> None:
    writer = EventWriter(path)
    fields = {
        "loss": float("nan"),
        "losses": {"ada": np.float32("inf"), "bob": np.float32(0.5)},
        "text": 'quotes " and \u2028 and \ud800 and \n',
        "bytes": {"ada": 2**63},
        "names": ("a", "b"),
        "path": path,
    }
    writer.write("round", fields)
    writer.write("end")
    assert path.read_bytes().count(b"\n") == 2, "on disk while the writer is open"
    first, second = read(path)
    assert (first.pop("event"), first.pop("schema")) == ("round", 1)
    assert datetime.fromisoformat(first.pop("time")).utcoffset() is not None
    plain = {"loss": None, "losses": {"ada": None, "bob": 0.5}, "names": ["a", "b"]}
    assert first == fields | plain | {"path": str(path)}
    assert (second["event"], "schema" in second) == ("end", False)
    writer.close()


def test_a_file_cut_anywhere_is_read_and_continued(path: Path) -> None:
    write(path, "start", "round", "round")
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        there = read(path)
        assert len(there) == whole[:cut].count(b"\n")
        write(path, "start")
        after = read(path)
        assert after[:-1] == there
        assert after[-1]["event"] == "start"
        assert "schema" in after[0]
        assert path.read_bytes().count(b"\n") == len(after)


def test_a_growing_file_is_followed(path: Path) -> None:
    """Bytes come in any portions; no event is lost, none is read twice."""
    names = [f"event-{i}" for i in range(40)]
    write(path, *names)
    whole, at = path.read_bytes(), 0
    path.unlink()
    reader, seen = EventReader(path), []
    assert reader.poll() == []
    draw = random.Random(len(whole))
    with path.open("ab", buffering=0) as file:
        while at < len(whole):
            at += file.write(whole[at : at + draw.randint(1, 90)])
            seen += kinds(reader.poll())
    assert seen == names
    path.unlink()
    write(path, "anew")
    assert [(e["event"], e["schema"]) for e in reader.poll()] == [("anew", 1)]


def test_damaged_lines_are_passed_over_and_counted(path: Path) -> None:
    write(path, "start", "round")
    deep = b"[" * 100_000
    path.write_bytes(path.read_bytes() + b'\0\xff\n{"event": 3}\n' + deep + b"\n[]\n\n")
    write(path, "end")
    reader = EventReader(path)
    assert kinds(reader.poll()) == ["start", "round", "end"]
    assert reader.damaged == 5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("hello\n", "names no schema"),
        ('{"event": "start", "time": ""}\n', "names no schema"),
        ('{"event": "start", "schema": 2}\n', "schema 2, this package reads 1"),
        ("no end of line", "left as it is"),
    ],
)
def test_other_files_are_refused_and_left_alone(path: Path, content: str, words: str) -> None:
    path.write_text(content)
    with pytest.raises(RunFolderError, match=words):
        EventWriter(path)
    if content.endswith("\n"):  # else it might be a line that is being written
        with pytest.raises(RunFolderError, match=words):
            read(path)
    assert path.read_text() == content


class FullDisk:
    def __init__(self, file: Any) -> None:
        self.file, self.full = file, False

    def write(self, data: bytes) -> int:
        return int(self.file.write(data[:5] if self.full else data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_full_disk_loses_events_and_says_how_many(path: Path) -> None:
    writer = EventWriter(path)
    disk: Any = FullDisk(writer._file)
    writer._file = disk
    for event in ("start", "x", "x", "x", "end"):
        disk.full = event == "x"
        writer.write(event)
    writer.close()
    told = [(event["event"], event.get("events")) for event in read(path)]
    assert told == [("start", None), ("lost", 3), ("end", None)]


def record(world: World, folder: RunFolder, rounds: int, plan: Any = None, **options: Any) -> None:
    with RunRecorder(folder, world.server, rounds, plan) as recorder:
        result = world.run(rounds, on_round=recorder.round, **options)
        recorder.evaluation(rounds, accuracy=0.5, auc=None)
        recorder.end(result)


def test_events_of_a_run(folder: RunFolder, make_world: Any) -> None:
    world = make_world(lr=lambda t: 0.1 / t)
    fail(world.clients["bob"], OSError("the data\nis gone " + "x" * 2000))
    record(world, folder, 3, available=lambda t: NAMES if t < 3 else NAMES[1:2])
    start, *rounds, evaluation, end = read(folder.events)
    assert start["settings"]["lr"] == "0.1 in round 1, 0.03333 in round 3"
    assert start["settings"]["num_perturbations"] == 3
    assert (start["round"], start["last_round"]) == (0, 3)
    assert start["plan"] == json.loads(folder.plan.read_text())
    assert start["plan"]["mask"] == ["".join("01"[a] for a in row) for row in MASKS]
    assert start["machine"]["torch"] == torch.__version__
    assert [r["round"] for r in rounds] == [1, 2, 3]
    first, last = rounds[0], world.server.log.entry(2)
    assert first["clients"] == ["ada", "cleo"]
    losses = first["losses"]
    assert first["loss"] == pytest.approx((losses["ada"] * 10 + losses["cleo"] * 12) / 22)
    assert first["failures"].keys() == {"bob"}
    assert len(first["failures"]["bob"]) == 500
    assert first["bytes_up"]["ada"] > 0
    assert first["uncovered"] == [2], "bob's alone"
    assert rounds[2]["uncovered"] == list(range(BLOCKS))
    assert rounds[2]["loss"] is None
    assert rounds[1]["base_fingerprint"] == f"{last.base:016x}"
    assert (evaluation["accuracy"], evaluation["auc"]) == (0.5, None)
    assert end["replicas_identical"]
    assert set(end["fingerprints"].values()) == {f"{f:016x}" for f in world.fingerprints()}


def test_a_server_that_starts_again_continues(folder: RunFolder, world: World) -> None:
    record(world, folder, 2)
    world.server.close()
    world.path.write_bytes(world.path.read_bytes() + b"\1torn...")
    world.server = world.start()
    record(world, folder, 1)
    events = read(folder.events)
    one, two = ["start", "round", "round", "evaluation", "end"], ["start", "fault", "round"]
    assert kinds(events) == [*one, *two, "evaluation", "end"]
    again, fault = events[len(one) :][:2]
    assert (again["round"], again["last_round"]) == (2, 3)
    assert "8 bytes" in fault["text"]
    folder.clear()
    assert list(folder.path.iterdir()) == []


def test_what_ended_a_run_is_told(folder: RunFolder, world: World) -> None:
    recorder = RunRecorder(folder, world.server, 5)

    def on_round(report: RoundReport) -> None:
        recorder.round(report)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), recorder:
        world.run(5, on_round=on_round)
    events = read(folder.events)
    assert kinds(events) == ["start", "round", "end"]
    assert events[-1]["problem"] == "KeyboardInterrupt"


def test_the_plan_is_told(folder: RunFolder, make_world: Any) -> None:
    planning = pytest.importorskip("zorba.planning")
    memory = planning.MemoryModel([100] * BLOCKS, [0] * BLOCKS)
    plan, other = (planning.plan_blocks(memory, dict.fromkeys(NAMES, n)) for n in (200, 300))
    world = make_world(masks=plan.mask)
    with pytest.raises(ValueError, match="not those of the plan"):
        RunRecorder(folder, world.server, 1, other)
    record(world, folder, 1, plan)
    told = read(folder.events)[0]["plan"]
    assert json.loads(folder.plan.read_text()) == told
    assert (told["budgets"], told["memory"]) == ([200] * 3, [200] * 3)
    assert told["version"] == f"{plan.version:016x}"
    assert all(row.count("1") == 2 for row in told["mask"])
