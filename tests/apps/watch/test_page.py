"""The page of a run: whole for every run, and nothing but text from anyone else in it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from zorba.apps.watch.fields import clean
from zorba.apps.watch.page import write_report
from zorba.apps.watch.svg import short, stretches, ticks

from tests.apps.watch.runs import HOSTILE, Run
from tests.command import zorba

VOID = ("meta", "br", "link", "img", "input")


class Page(HTMLParser):
    """Reads a page strictly: tags must close in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.values: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.values += [value or "" for _, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"

    def check(self) -> None:
        """Asserts that it needs nothing else, runs nothing, and that its pictures are whole."""
        names = {tag for tag, _ in self.tags}
        assert not names & {"script", "img", "iframe", "object", "link", "base", "foreignobject"}
        attributes = {name for _, names in self.tags for name in names}
        assert not {a for a in attributes if a.startswith("on") or a in ("href", "src")}
        assert "default-src 'none'" in self.source
        assert not re.search(r"url\(|@import|https?:", self.source)
        for picture in re.findall(r"<svg.*?</svg>", self.source, re.DOTALL):
            ElementTree.fromstring(picture)
        assert not re.search(r"nan|inf\b|None", re.sub(r"<style>.*?</style>", "", self.source))


def page_of(folder: Path) -> Page:
    page = Page(write_report(folder))
    page.check()
    return page


def test_a_whole_run(tmp_path: Path, draw: random.Random) -> None:
    run = Run(tmp_path, ["ada", "bob", "cleo"], 12, 30, draw)
    run.writer.write("evaluation", {"round": 0, "accuracy": 0.516, "auc": 0.764, "loss": 0.71})
    for t in range(1, 31):
        run.round(t, failures={"bob": "OSError: gone"} if t > 20 else {}, away=["cleo"] * (t % 2))
    run.writer.write("evaluation", {"round": 30, "accuracy": 0.744, "auc": 0.841, "loss": 0.6})
    run.writer.write("memory", {"bytes": {"ada": 2**29 + 1, "bob": 2**32}})
    run.end()
    (tmp_path / "summary.json").write_text(json.dumps({"step_seconds": 0.25, "losses": [1] * 99}))
    page = page_of(tmp_path)
    for words in (
        "Federation reviews",
        "Ended after round 30, all replicas identical.",
        "0.516 → 0.744",
        "00ab00ab00ab00ab",
        "OSError: gone",
        "21 to 30",
        "4.0 GiB, 200%",
        "ada: measured in 30 of 30 rounds, failed or refused in 0",
        "a processor",
        "step_seconds",
    ):
        assert words in page.text, words
    assert [tag for tag, _ in page.tags].count("svg") == 8
    assert "losses" not in page.text, "lists of rounds are pictures, not text"


def nothing_happened(run: Run) -> None:
    pass


def nobody_replied(run: Run) -> None:
    for t in (1, 2):
        run.round(t, away=run.names)
    run.writer.write("end", {"problem": "RuntimeError: nobody is there"})


def killed(run: Run) -> None:
    run.round(1)
    file = run.path / "events.jsonl"
    file.write_bytes(file.read_bytes()[:-40])


def diverged(run: Run) -> None:
    run.round(1)
    run.end(replicas_identical=False, fingerprints={"client-0": "1" * 16, "x": "2" * 16})


def started_again(run: Run) -> None:
    run.round(1, loss=0.0, seconds=0.0)
    run.start(1)
    run.round(2, loss=0.0)


RUNS: dict[str, tuple[Callable[[Run], None], str]] = {
    "no round": (nothing_happened, "Round 0 of 9 is done, and no end was written"),
    "nobody": (nobody_replied, "Stopped after round 2: RuntimeError: nobody is there"),
    "killed": (killed, "no end was written"),
    "diverged": (diverged, "the replicas are not all identical"),
    "started again": (started_again, "the server started again, after no end was written"),
}


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("budgets", [True, False])
@pytest.mark.parametrize("name", RUNS)
def test_partial_runs(
    tmp_path: Path, draw: random.Random, name: str, clients: int, budgets: bool
) -> None:
    happens, words = RUNS[name]
    names = [f"client-{n}" for n in range(clients)]
    happens(Run(tmp_path, names, draw.randint(1, 30), 9, draw, budgets))
    assert words in page_of(tmp_path).text


def test_a_file_without_a_start(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "hm", "schema": 1}\nno json\n')
    (tmp_path / "summary.json").write_text("[no json")
    page = page_of(tmp_path)
    assert "No server has started this run." in page.text
    assert "1 damaged lines were passed over." in page.text


def test_large_runs_make_pages_of_a_readable_size(tmp_path: Path, draw: random.Random) -> None:
    run = Run(tmp_path, [f"client-{n}" for n in range(100)], 90, 1000, draw)
    for t in range(1, 1001):
        failing = draw.sample(run.names, 3)
        run.round(t, failures=dict.fromkeys(failing, f"answered after {t} s"))
    page = page_of(tmp_path)
    assert len(page.source) < 1_500_000
    assert "Each column is the worst of about 3 rounds." in page.text
    many = tmp_path / "many"
    run = Run(many, [f"client-{n}" for n in range(3000)], 4, 1, draw)
    run.round(1, failures={name: name for name in run.names})
    page = page_of(many)
    assert "Only the first 200 of 3,000 clients are shown." in page.text
    assert "And 2500 other clients." in page.text


def test_one_absurd_loss_leaves_the_rest_to_be_seen(tmp_path: Path, draw: random.Random) -> None:
    run = Run(tmp_path, ["ada", "bob"], 4, 40, draw)
    for t in range(1, 41):
        run.round(t, **({"loss": 3e38, "losses": {"ada": 3e38}} if t == 17 else {}))
    page = page_of(tmp_path)
    assert "1 rounds lie outside of the picture." in page.text
    assert not re.search(r"\d{9}", page.text), "no endless figures"


# --- What others say -----------------------------------------------------------------------------


def said(folder: Path, draw: random.Random, texts: list[str]) -> Page:
    """The page of a run in which everything that can say something says one of the texts."""
    run = Run(folder, texts, len(texts), 4, draw)
    run.mask = [[True] * len(texts) for _ in texts]
    plan = {**run.plan, "blocks": texts, "mask": ["1" * len(texts)] * len(texts)}
    facts = dict(zip(texts, texts, strict=True))
    run.start(0, job=texts[0], settings=facts, machine=facts, plan=plan)
    run.writer.write("evaluation", {"round": 0, texts[0]: 0.5, texts[1]: 0.6})
    run.writer.write("memory", {"bytes": dict.fromkeys(texts, 2**30)})
    run.round(1)
    run.round(2, failures=facts)
    run.round(3, refusals=facts, problem=texts[2])
    for text in texts:
        run.writer.write("fault", {"text": text, "client": text})
        run.writer.write("replan", {"reason": text, "plan": plan})
    run.end(failures=facts, fingerprints=facts)
    (folder / "summary.json").write_text(json.dumps(facts))
    return page_of(folder)


def test_hostile_texts_are_text(tmp_path: Path, draw: random.Random) -> None:
    """Tag by tag and attribute by attribute it is the page of a harmless run."""
    texts = list(HOSTILE)
    harmless = [chr(ord("a") + n) * 9 for n in range(len(texts))]
    page, other = (
        said(tmp_path / name, random.Random(repr(draw.getstate())), some)
        for name, some in (("hostile", texts), ("harmless", harmless))
    )
    assert page.tags == other.tags
    for text in texts:
        assert clean(text) in page.text, text
        assert short(clean(text)) in page.text, text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", page.source)


# --- Command and figures -------------------------------------------------------------------------


def test_command(tmp_path: Path, draw: random.Random) -> None:
    run = Run(tmp_path / "run", ["ada"], 2, 1, draw)
    run.round(1)
    done = zorba("report", run.path)
    assert done.exit_code == 0, done.output
    assert "wrote" in done.output
    assert (run.path / "report.html").is_file()
    out = tmp_path / "new" / "page.html"
    assert zorba("report", run.path, "--out", out).exit_code == 0
    assert out.is_file()
    for path, words in ((tmp_path, "there is no run at"), (out.parent, "there is no run at")):
        refused = zorba("report", path)
        assert refused.exit_code == 1
        assert words in refused.output
    assert zorba("report", run.path, "--out", out / "x").exit_code == 1


def test_ticks_are_round_and_inside(draw: random.Random) -> None:
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(0.52, 0.77, 5) == [0.55, 0.6, 0.65, 0.7, 0.75]
    for _ in range(500):
        low = draw.uniform(-1, 1) * 10 ** draw.randint(-6, 9)
        high = low + draw.uniform(0.01, 1) * 10 ** draw.randint(-3, 9)
        found = ticks(low, high, 5)
        assert 2 <= len(found) <= 8
        slack = 1e-6 * (high - low) + 1e-9 * abs(low)
        assert all(low - slack <= value <= high + slack for value in found)


def test_stretches_cover_everything_once() -> None:
    for count, most in ((1, 5), (5, 5), (6, 5), (1001, 300)):
        parts = stretches(count, most)
        assert len(parts) == min(count, most)
        assert [i for a, b in parts for i in range(a, b)] == list(range(count))
