"""The page of a run: whole for every run, and nothing but text from anyone else in it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from zorba.apps.watch.fields import clean
from zorba.apps.watch.figures import short
from zorba.apps.watch.live import read_run
from zorba.apps.watch.page import render_page, write_report

from tests.apps.watch.runs import HOSTILE, Run
from tests.command import zorba

VOID = ("meta", "br", "link", "img", "input")
TAGS = """
    html head meta title style body header main section footer h1 h2 h3 p dl div dt dd small table
    thead tbody tr th td figure figcaption svg g defs path clippath use text tspan rect image
"""


class Page(HTMLParser):
    """Reads a page strictly: tags must close in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    @property
    def tags(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(tag, tuple(name for name, _ in attrs)) for tag, attrs in self.attributes]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"

    def check(self) -> None:
        """Asserts that it needs nothing else, runs nothing, and that its pictures are whole."""
        assert {tag for tag, _ in self.tags} <= set(TAGS.split())
        attributes = [(name, value or "") for _, found in self.attributes for name, value in found]
        assert not [name for name, _ in attributes if name.startswith("on") or name == "src"]
        links = [value for name, value in attributes if name.endswith("href")]
        links += re.findall(r"url\((.*?)\)", self.source)
        assert all(re.match("#|data:image/png;base64,", link) for link in links), links
        ids = [value for name, value in attributes if name == "id"]
        assert len(ids) == len(set(ids))
        assert {link[1:] for link in links if link[0] == "#"} <= set(ids)
        assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in self.source
        assert not re.search(r"@import|https?:", self.source)
        for picture in re.findall(r"<svg.*?</svg>", self.source, re.DOTALL):
            ElementTree.fromstring(picture)
        assert not re.search(
            r"\b(nan|inf|None)\b", re.sub(r"(?s)<style>.*?</style>", "", self.source)
        )


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
        "512.0 MiB",
        "4.0 GiB",
        "% of budget",
        "a processor",
        "step_seconds",
    ):
        assert words in page.text, words
    assert [tag for tag, _ in page.tags].count("svg") == 6
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
    "no round": (nothing_happened, "Round 0 of 9, under way."),
    "nobody": (nobody_replied, "Stopped after round 2: RuntimeError: nobody is there"),
    "killed": (killed, "Round 0 of 9, under way."),
    "diverged": (diverged, "the replicas are not all identical"),
    "started again": (started_again, "the server started again, after no end was written"),
}


@pytest.mark.parametrize("name", RUNS)
def test_partial_runs(tmp_path: Path, draw: random.Random, name: str) -> None:
    happens, words = RUNS[name]
    names = [f"client-{n}" for n in range(draw.choice((1, 3)))]
    happens(Run(tmp_path, names, draw.randint(1, 30), 9, draw, budgets=draw.random() < 0.5))
    assert words in page_of(tmp_path).text


def test_a_run_that_was_killed_is_told_from_one_under_way(
    tmp_path: Path, draw: random.Random
) -> None:
    killed(Run(tmp_path, ["ada"], 2, 9, draw))
    _, state = read_run(tmp_path)
    assert state.last_event is not None
    for seconds, words in (
        (5, "under way."),
        (3600, "no event for 1:00:00: it waits, or was kill"),
    ):
        page = render_page(state, now=state.last_event + timedelta(seconds=seconds))
        assert f"Round 0 of 9, {words}" in page


def test_a_file_without_a_start(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "hm", "schema": 1}\nno json\n')
    (tmp_path / "summary.json").write_text("[no json")
    page = page_of(tmp_path)
    assert "No server has started this run." in page.text
    assert "1 damaged lines were passed over." in page.text


def test_large_runs_make_pages_of_a_readable_size(tmp_path: Path, draw: random.Random) -> None:
    run = Run(tmp_path, [f"client-{n}" for n in range(100)], 90, 800, draw)
    for t in range(1, 801):
        failing = draw.sample(run.names, 3)
        run.round(t, failures=dict.fromkeys(failing, f"answered after {t} s"))
    page = page_of(tmp_path)
    assert len(page.source) < 1_500_000
    assert "Each column is the worst of about 2 rounds." in page.text
    many = tmp_path / "many"
    run = Run(many, [f"client-{n}" for n in range(700)], 4, 1, draw)
    run.round(1, failures={name: name for name in run.names})
    page = page_of(many)
    assert "Only the first 200 of 700 clients are shown." in page.text
    assert "And 200 other clients." in page.text


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
