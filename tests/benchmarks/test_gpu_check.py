"""``make gpu-check`` where there is no GPU: the command, its runner and what it writes down."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import stages, summary
from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.stages import STAGES, Stage, run_all, run_process

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def report(tmp_path) -> Report:
    return Report(tmp_path / "report.json", time.monotonic() + 60)


def gpu_check(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_check", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


# --- The command ---------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so_and_ends_with_2(tmp_path):
    done = gpu_check("--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == ""
    line = done.stdout.rstrip("\n")
    assert line.startswith("gpu-check needs a GPU, and there is none to use: torch.cuda.")
    assert "\n" not in line
    assert list(tmp_path.iterdir()) == []


def test_rehearsal_writes_one_file(tmp_path):
    """The whole way through processes, for stages that take a moment."""
    done = gpu_check("--rehearse", "--out", str(tmp_path), "weights", "sanitizer")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("gpu-rehearsal-")
    result = json.loads(path.read_text())
    assert result["complete"]
    assert result["passed"]
    assert [stage["name"] for stage in result["stages"]] == ["weights", "sanitizer"]
    assert len(result["stages"][0]["checks"]) == 8
    assert str(path) in done.stdout
    assert "PASSED in" in done.stdout


def test_unknown_stage():
    done = gpu_check("speling")
    assert done.returncode == 2
    assert "there is no stage speling; there are build, identity" in done.stderr


def test_budget():
    """Every stage has its least when those before take what they may, up to the optional ones."""
    assert sum(stage.limit for stage in STAGES) < 60 * 15
    left = 460.0
    for stage in STAGES:
        assert stage.least <= stage.limit
        if not stage.optional:
            left -= stage.least
    assert left > 200
    assert all((ROOT / f"benchmarks/gpu_check/{stage.name}.py").is_file() for stage in STAGES)


# --- The runner ----------------------------------------------------------------------------------

ALL = [Stage(name, "", 5, 1) for name in ("first", "second", "third")]


def results_of(runs, optional=(), seconds=100.0, folder=Path()):
    """Runs stages that are written here; returns rows and what was recorded after each."""
    records = []
    todo = [s._replace(optional=s.name in optional) for s in ALL]
    rows = run_all(
        todo, lambda s, path, limit: runs[s.name](path, limit),
        lambda r: records.append(json.loads(json.dumps(r))), folder, seconds,
    )  # fmt: skip
    return {row["name"]: row for row in rows}, records


def passing(path, limit):
    with Report(path, time.monotonic() + limit).check("fine"):
        pass
    return "passed", ["much output"]


def failing(path, limit):
    with Report(path, time.monotonic() + limit).check("equal bits"):
        raise AssertionError("they differ")
    return "failed", ["some output"]


def stopped(path, limit):
    passing(path, limit)
    return "timed out", ["stopped"]


def test_a_failing_stage_is_recorded_and_the_others_run(tmp_path):
    runs = {"first": failing, "second": passing, "third": passing}
    rows, records = results_of(runs, folder=tmp_path)
    assert [len(record) for record in records] == [1, 2, 3]
    assert not rows["first"]["good"]
    assert rows["first"]["output"] == ["some output"]
    assert "they differ" in rows["first"]["checks"][0]["error"]
    assert rows["second"]["good"]
    assert rows["third"]["good"]
    assert "output" not in rows["second"]


def test_a_stopped_stage_keeps_what_it_found(tmp_path):
    runs = {"first": stopped, "second": passing, "third": passing}
    rows, _ = results_of(runs, folder=tmp_path)
    assert rows["first"]["outcome"] == "timed out"
    assert not rows["first"]["good"]
    assert rows["first"]["checks"][0]["name"] == "fine"


def test_only_a_failed_check_of_an_optional_stage_fails_the_run(tmp_path):
    runs = {"first": stopped, "second": failing, "third": lambda p, s: ("failed", ["crash"])}
    rows, _ = results_of(runs, optional=("first", "second", "third"), folder=tmp_path)
    assert [row["good"] for row in rows.values()] == [True, False, True]


def test_stages_are_skipped_when_time_runs_short(tmp_path):
    def slow(path, limit):
        assert limit <= 1.2
        time.sleep(0.4)
        return passing(path, limit)

    runs = {"first": slow, "second": passing, "third": passing}
    rows, records = results_of(runs, optional=("third",), seconds=1.2, folder=tmp_path)
    assert rows["first"]["outcome"] == "passed"
    assert rows["second"]["outcome"] == "skipped"
    assert "needs at least 1" in rows["second"]["reason"]
    assert not rows["second"]["good"]
    assert rows["third"]["good"]
    assert len(records) == 3


def test_a_process_that_runs_on_is_ended_with_its_children(capfd, tmp_path):
    code = f"""
import subprocess, sys, time
print("begun", flush=True)
child = "import time, pathlib; time.sleep(6); pathlib.Path({str(tmp_path / "alive")!r}).touch()"
subprocess.Popen([sys.executable, "-c", child])
time.sleep(60)
"""
    outcome, lines = run_process([sys.executable, "-c", code], 4.0)
    assert outcome == "timed out"
    assert lines == ["begun", "stopped after 4 s"]
    assert capfd.readouterr().out == "begun\n"
    time.sleep(3)
    assert not (tmp_path / "alive").exists()


def test_a_crash_is_told_from_a_failed_check():
    outcome, lines = run_process([sys.executable, "-c", "import os; os.abort()"], 30)
    assert outcome == "failed"
    assert lines[-1] == "ended with status -6"


def test_nothing_forces_a_backend_in_a_stage(monkeypatch):
    monkeypatch.setenv("ZORBA_BACKEND", "reference")
    assert "ZORBA_BACKEND" not in stages.environment()
    assert str(ROOT / "python") in stages.environment()["PYTHONPATH"]


# --- Reports -------------------------------------------------------------------------------------


def test_every_finding_is_on_disk_at_once(report):
    def there():
        return json.loads(report.path.read_text())

    with report.check("one", elements=3) as facts:
        facts["passed"] = "a fact of the name of a result"
    assert there()["checks"][0]["passed"] is True
    with report.check("two"):
        raise ValueError("broken")
    assert there()["checks"][1]["passed"] is False
    assert "broken" in there()["checks"][1]["error"]
    assert not report.passed
    report.measure("group", "name", ms=1.5)
    report.target("fast", 0.8, 0.9, "of the copy's speed", least=True)
    report.target("short", 39.0, 40.0, "ms", least=False)
    assert [t["met"] for t in there()["targets"]] == [False, True]
    with report.part("a long part"):
        raise TimeoutError("9 runs would take 900 s")
    assert there()["notes"] == {"a long part, left out": "9 runs would take 900 s"}
    assert there()["measures"] == [{"group": "group", "name": "name", "ms": 1.5}]


def test_summary_names_what_failed_and_what_was_left_out(report):
    with report.check("equal bits"):
        raise AssertionError
    report.note(left_out="the tool is not present")
    report.note(**{"a peer, left out": ""})
    report.target("fast", 0.8, 0.9, "of the copy's speed", least=True)
    report.measure("speed", "copy", ms=2.0, gb_per_s=4300.0)
    found = json.loads(report.path.read_text())
    row = stages.row_of(ALL[0], "failed", 1.0, found)
    late = stages.row_of(ALL[1], "skipped", 0.0, {}) | {"reason": "0 s were left"}
    text = "\n".join(summary.lines({"stages": [row, late], "passed": False, "seconds": 10.0}))
    for part in (
        "a peer, left out: \n",
        "FAILED equal bits",
        "not present",
        "NOT MET fast",
        "0 s were left",
        "4300",
    ):
        assert part in text
    assert text.endswith("FAILED in 10 s")
