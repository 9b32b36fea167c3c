"""The view of a run in a terminal, and the lines that take its place elsewhere."""

from __future__ import annotations

import io
import random
import re
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from rich.console import Console
from zorba.apps.watch import Follower
from zorba.apps.watch.live import LiveView, view_run
from zorba.federated import RunFolderError

from tests.apps.watch.runs import HOSTILE, Run
from tests.command import zorba


def show(path: Path, width: int, height: int = 40, after: float = 0.0) -> str:
    state = Follower(path / "events.jsonl").update()
    output = io.StringIO()
    console = Console(file=output, width=width, height=height, color_system=None)
    assert state.last_event is not None
    console.print(view_run(state, console, state.last_event + timedelta(seconds=after)))
    assert all(len(line) <= width for line in output.getvalue().splitlines())
    return output.getvalue()


def view_lines(path: Path) -> tuple[LiveView, str]:
    """A view of a run that ends, where there is no terminal, and what it printed."""
    output = io.StringIO()
    with LiveView(path / "events.jsonl", Console(file=output, width=200)) as view:
        assert view.ended.wait(30)
    return view, output.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_view_of_a_run(tmp_path: Path, draw: random.Random, width: int) -> None:
    run = Run(tmp_path, ["ada", "bob", "cleo"], 12, 10, draw)
    assert "waiting" in show(tmp_path, width)
    run.writer.write("evaluation", {"round": 0, "accuracy": 0.5, "auc": None})
    for t in range(1, 7):
        run.round(t, failures={"bob": "OSError: gone"}, away=["cleo"])
    text = show(tmp_path, width)
    for words in ("reviews", "Round 6 of 10", "loss", "accuracy", "0.500", "coverage", "faults"):
        assert words in text, words
    for name, state in (("ada", "measured"), ("bob", "failed"), ("cleo", "sits out")):
        assert re.search(rf"^{name} .*{state[:4]}", text, re.MULTILINE), name
    assert bool(re.search("^ada +[█·]{12}", text, re.MULTILINE)) == (width >= 60)
    assert "no event for" not in text
    assert "no event for" in show(tmp_path, max(width, 60), after=3600)
    run.end()
    text = show(tmp_path, width, after=3600)
    assert "Ended after round 6" in text
    assert "no event for" not in text


def test_many_clients_fit_on_the_screen(tmp_path: Path, draw: random.Random) -> None:
    run = Run(tmp_path, [f"client-{n}" for n in range(300)], 100, 5, draw)
    run.round(1, failures={"client-299": "bad battery"})
    text = show(tmp_path, 100, height=24)
    assert len(text.splitlines()) <= 24
    assert "client-299" in text, "whoever failed is shown first"
    hidden = re.search(r"and (\d+) more: (\d+) measured", text)
    assert hidden is not None
    assert hidden[1] == hidden[2] == str(300 - len(re.findall("(?m)^client-", text)))


@pytest.mark.parametrize("bad", HOSTILE)
def test_texts_of_clients_are_shown_as_they_are(
    tmp_path: Path, draw: random.Random, bad: str
) -> None:
    run = Run(tmp_path, ["ada", bad], 4, 5, draw)
    run.start(0, job=bad + "[/]")
    run.writer.write("evaluation", {"round": 0, bad: 0.5})
    run.round(1, failures={bad: bad})
    run.end()
    text = show(tmp_path, 200)
    assert "ada" in text
    if "bold red" in bad:
        assert "failed: [bold red]markup[/bold red]" in text
    for shown in (text, view_lines(tmp_path)[1]):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", shown)


def test_lines_where_there_is_no_terminal(tmp_path: Path, draw: random.Random) -> None:
    """Events that come while it is shown, from another thread."""

    def serve() -> None:
        run = Run(tmp_path, ["ada", "bob"], 4, 50, draw)
        for t in range(1, 51):
            run.round(t, refusals={"bob": f"it measured after round {t - 9}"})
        run.writer.write("evaluation", {"round": 50, "accuracy": 0.75})
        run.end()

    server = threading.Timer(0.1, serve)
    server.start()
    lines = view_lines(tmp_path)[1].splitlines()
    server.join()
    assert len(lines) == 1 + 1 + 50 + 1 + 1
    assert re.fullmatch(r"\d\d:\d\d:\d\d reviews: rounds 1 to 50, 2 clients, 4 blocks", lines[0])
    assert "round 1: bob refused: it measured after round -8" in lines[1]
    assert re.search(r"round 50/50: loss 0\.\d+, 1 measured, 1 refused", lines[-3])
    assert lines[-2].endswith("round 50: accuracy 0.750")
    assert "Ended after round 50, all replicas identical." in lines[-1]
    assert "00ab00ab00ab00ab" in lines[-1]


def test_a_terminal_gets_the_view_and_a_few_lines(tmp_path: Path, draw: random.Random) -> None:
    output = io.StringIO()
    console = Console(file=output, width=100, force_terminal=True, _environ={"TERM": "xterm"})
    run = Run(tmp_path, ["ada", "bob"], 4, 50, draw)
    with LiveView(tmp_path / "events.jsonl", console) as view:
        for t in range(1, 31):
            run.round(t)
        run.end()
        assert view.ended.wait(10)
    shown = output.getvalue()
    assert "Ended after round 30" in shown
    assert "round 30/50" not in shown
    assert "\x1b[?25h" in shown, "the cursor is back"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("hello\n")
    view, output = view_lines(tmp_path)
    assert isinstance(view.error, RunFolderError)
    assert "the view of the run stopped" in output
    for path, words in ((tmp_path, "names no schema"), (tmp_path / "x", "there is no run at")):
        result = zorba("watch", path)
        assert result.exit_code == 1
        assert words in result.text


def test_command(tmp_path: Path, draw: random.Random) -> None:
    run = Run(tmp_path, [f"client-{n}" for n in range(60)], 4, 3, draw)
    run.round(1)
    assert zorba("watch", tmp_path, "--once").output.count("client-") == 60
    run.end()
    assert "rounds 1 to 3, 60 clients" in zorba("watch", tmp_path).output
