"""Events of a run: what is written is read, whatever a kill or a full disk leaves of the file."""

from __future__ import annotations

import json
import random
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from zorba.federated import (
    EventReader,
    EventWriter,
    RoundReport,
    RunFolder,
    RunFolderError,
    RunRecorder,
    run_federation,
)

from tests.federated.world import BLOCKS, MASKS, NAMES, World, make_settings


def read(path: Path) -> list[dict[str, Any]]:
    return EventReader(path).poll()


def write(path: Path, *names: str) -> None:
    writer = EventWriter(path)
    for name in names:
        writer.write(name)
    writer.close()


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writer = EventWriter(path)
    fields = {
        "loss": float("nan"),
        "text": 'quotes " and \u2028 and \ud800 and \n',
        "bytes": {"ada": 2**63},
        "names": ("a", "b"),
        "path": tmp_path,
    }
    writer.write("round", fields)
    writer.write("end")
    assert path.read_bytes().count(b"\n") == 2, "on disk while the writer is open"
    first, second = read(path)
    assert first["schema"] == 1
    assert "schema" not in second
    assert datetime.fromisoformat(first["time"]).utcoffset() is not None
    assert first["loss"] is None
    assert first["text"] == fields["text"]
    assert first["bytes"] == {"ada": 2**63}
    assert first["names"] == ["a", "b"]
    assert first["path"] == str(tmp_path)
    assert second["event"] == "end"
    writer.close()


def test_a_file_cut_anywhere_is_read_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
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


def test_a_growing_file_is_followed(tmp_path: Path) -> None:
    """Bytes come in any portions; no event is lost, none is read twice."""
    path = tmp_path / "events.jsonl"
    write(path, *(f"event-{i}" for i in range(40)))
    whole, at = path.read_bytes(), 0
    path.unlink()
    reader = EventReader(path)
    assert reader.poll() == []
    seen: list[str] = []
    draw = random.Random(len(whole))
    with path.open("ab", buffering=0) as file:
        while at < len(whole):
            step = draw.randint(1, 90)
            file.write(whole[at : at + step])
            at += step
            seen += [event["event"] for event in reader.poll()]
    assert seen == [f"event-{i}" for i in range(40)]
    path.unlink()
    write(path, "anew")
    assert [(e["event"], e["schema"]) for e in reader.poll()] == [("anew", 1)]


def test_damaged_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, "start", "round")
    deep = b"[" * 100_000
    path.write_bytes(path.read_bytes() + b'\0\xff\n{"event": 3}\n' + deep + b"\n[]\n\n")
    write(path, "end")
    reader = EventReader(path)
    assert [event["event"] for event in reader.poll()] == ["start", "round", "end"]
    assert reader.damaged == 5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("hello\n", "names no schema"),
        ('{"event": "start", "time": ""}\n', "names no schema"),
        ('{"event": "start", "schema": 2}\n', "schema 2, this package reads 1"),
    ],
)
def test_other_files_are_refused_and_left_alone(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(content)
    with pytest.raises(RunFolderError, match=words):
        read(path)
    with pytest.raises(RunFolderError, match=words):
        EventWriter(path)
    assert path.read_text() == content
    path.write_text("no end of line")
    with pytest.raises(RunFolderError, match="left as it is"):
        EventWriter(path)
    assert path.read_text() == "no end of line"


class FullDisk:
    """A file whose writes come short while the disk is full."""

    def __init__(self, file: Any) -> None:
        self.file, self.full = file, False

    def write(self, data: bytes) -> int:
        if self.full and len(data) > 5:
            self.file.write(data[:5])
            return 5
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_full_disk_loses_events_and_says_how_many(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writer = EventWriter(path)
    disk = FullDisk(writer._file)
    writer._file = disk  # type: ignore[assignment]
    writer.write("start")
    disk.full = True
    for _ in range(3):
        writer.write("round")
    disk.full = False
    writer.write("end")
    writer.close()
    assert [(e["event"], e.get("events")) for e in read(path)] == [
        ("start", None),
        ("lost", 3),
        ("end", None),
    ]


def test_threads_share_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writer = EventWriter(path)
    threads = [
        threading.Thread(target=lambda: [writer.write("x", {"pad": "y" * 300}) for _ in range(50)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    reader = EventReader(path)
    assert len(reader.poll()) == 200
    assert reader.damaged == 0


# --- The recorder --------------------------------------------------------------------------------


def record(world: World, folder: RunFolder, rounds: int, **options: Any) -> None:
    with RunRecorder(folder, world.server, rounds) as recorder:
        result = run_federation(
            world.server, world.transport, rounds, on_round=recorder.round, **options
        )
        recorder.evaluation(rounds, accuracy=0.5, auc=None)
        recorder.end(result)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_events_of_a_run(folder: RunFolder) -> None:
    folder.clear()
    world = World(folder.log, make_settings(lr=lambda t: 0.1 / t))

    def broken(round_number: int, step: int) -> Any:
        raise OSError("the data\nis gone " + "x" * 2000)

    world.clients["bob"].objective = broken
    record(world, folder, 3, available=lambda t: NAMES if t < 3 else NAMES[1:2])
    start, *rounds, evaluation, end = read(folder.events)
    assert start["settings"]["lr"] == "0.1 in round 1, 0.03333 in round 3"
    assert start["settings"]["num_perturbations"] == 3
    assert (start["round"], start["last_round"]) == (0, 3)
    assert start["plan"] == json.loads(folder.plan.read_text())
    assert start["plan"]["mask"] == ["".join("01"[a] for a in row) for row in MASKS]
    assert start["machine"]["torch"] == torch.__version__
    assert [r["round"] for r in rounds] == [1, 2, 3]
    first = rounds[0]
    assert first["clients"] == ["ada", "cleo"]
    assert first["loss"] == pytest.approx(
        sum(first["losses"][n] * e for n, e in (("ada", 10), ("cleo", 12))) / 22
    )
    assert first["failures"].keys() == {"bob"}
    assert len(first["failures"]["bob"]) == 500
    assert first["bytes_up"]["ada"] > 0
    assert first["uncovered"] == [2], "bob's alone"
    assert rounds[2]["uncovered"] == list(range(BLOCKS))
    assert rounds[2]["loss"] is None
    last = world.server.log.entry(2)
    assert rounds[1]["base_fingerprint"] == f"{last.base:016x}"
    assert (evaluation["accuracy"], evaluation["auc"]) == (0.5, None)
    assert end["replicas_identical"]
    told = {f"{r.fingerprint(fresh=True):016x}" for r in world.replicas.values()}
    assert set(end["fingerprints"].values()) == told
    world.server.close()


def test_a_server_that_starts_again_continues(folder: RunFolder) -> None:
    world = World(folder.log)
    record(world, folder, 2)
    world.server.close()
    folder.log.write_bytes(folder.log.read_bytes() + b"\1torn...")
    world.server = world.start()
    record(world, folder, 1)
    kinds = [event["event"] for event in read(folder.events)]
    one = ["start", "round", "round", "evaluation", "end"]
    assert kinds == [*one, "start", "fault", "round", "evaluation", "end"]
    again, fault = read(folder.events)[len(one) :][:2]
    assert (again["round"], again["last_round"]) == (2, 3)
    assert "8 bytes" in fault["text"]
    world.server.close()
    folder.clear()
    assert list(folder.path.iterdir()) == []


def test_what_ended_a_run_is_told(folder: RunFolder) -> None:
    world = World(folder.log)
    recorder = RunRecorder(folder, world.server, 5)

    def on_round(report: RoundReport) -> None:
        recorder.round(report)
        recorder.replan(None, "cleo left")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), recorder:
        run_federation(world.server, world.transport, 5, on_round=on_round)
    start, _, replan, end = read(folder.events)
    assert (replan["reason"], replan["plan"]) == ("cleo left", start["plan"])
    assert end["problem"] == "KeyboardInterrupt"
    world.server.close()


def test_new_masks_are_told(folder: RunFolder) -> None:
    planning = pytest.importorskip("zorba.planning")
    memory = planning.MemoryModel([100] * BLOCKS, [0] * BLOCKS)
    by_hand, plan = (planning.plan_blocks(memory, dict.fromkeys(NAMES, n)) for n in (300, 200))
    world = World(folder.log)
    with RunRecorder(folder, world.server, 2, by_hand) as recorder:
        run_federation(world.server, world.transport, 1, on_round=recorder.round)
        world.server.set_masks(plan.clients, plan.mask)
        recorder.replan(plan, "less room")
        run_federation(world.server, world.transport, 1, on_round=recorder.round)
    start, _, replan, _ = read(folder.events)
    assert start["plan"]["budgets"] == [300] * 3
    assert "version" not in start["plan"], "the server has other masks than the plan"
    assert (replan["event"], replan["round"], replan["reason"]) == ("replan", 1, "less room")
    assert all(row.count("1") == 2 for row in replan["plan"]["mask"])
    assert replan["plan"]["memory"] == [200] * 3
    assert replan["plan"]["version"]
    assert json.loads(folder.plan.read_text()) == replan["plan"]
    world.server.close()
