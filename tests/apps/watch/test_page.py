"""The page of a run: whole for every run, and nothing but text from anyone else in it."""

from __future__ import annotations

import base64
import json
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from zorba.apps.watch.events import clean
from zorba.apps.watch.figures import short
from zorba.apps.watch.page import write_report

from tests.apps.watch.runs import HOSTILE, Run
from tests.command import zorba

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
IMAGE = "data:image/svg+xml;base64,"
TAGS = """
    html head meta title style body header main section footer h1 h2 h3 p dl div dt dd small table
    thead tbody tr th td figure figcaption img
"""


class Page(HTMLParser):
    """Reads the page of a run strictly: tags close in order, and nothing in it needs more."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, tuple[str, ...]]] = []  # with the names of their attributes
        self.pictures: list[ElementTree.Element] = []
        self.text = ""
        self.source = write_report(folder).read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []
        assert {tag for tag, _ in self.tags} <= set(TAGS.split())
        assert f'"{POLICY}"' in self.source
        assert not re.search(r"@import|https?:|url\(", self.source)
        assert not re.search(r"\b(nan|inf|None)\b", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        for name, value in attrs:
            assert not name.startswith("on")
            assert "href" not in name
            if name == "src":
                assert (value or "").startswith(IMAGE)
                self.pictures.append(ElementTree.fromstring(base64.b64decode(value[len(IMAGE) :])))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += "" if self.open[-1:] == ["style"] else data + "\n"

    @property
    def labels(self) -> str:
        return "\n".join(text for picture in self.pictures for text in picture.itertext())


def test_a_whole_run(tmp_path: Path, draw: random.Random) -> None:
    run = Run(tmp_path, ["ada", "bob", "cleo"], 12, 30, draw)
    run.writer.write("evaluation", {"round": 0, "accuracy": 0.516, "auc": 0.764, "loss": 0.71})
    for t in range(1, 31):
        run.round(t, failures={"bob": "OSError: gone"} if t > 20 else {}, away=["cleo"] * (t % 2))
    run.writer.write("evaluation", {"round": 30, "accuracy": 0.744, "auc": 0.841, "loss": 0.6})
    run.end()
    (tmp_path / "summary.json").write_text(json.dumps({"step_seconds": 0.25, "losses": [1] * 999}))
    page = Page(tmp_path)
    told = "Federation reviews|Ended after round 30, all replicas identical.|0.516 → 0.744|"
    told += "00ab00ab00ab00ab|OSError: gone|21 to 30|512.0 MiB|3.0 GiB|a processor|step_seconds"
    for words in told.split("|"):
        assert words in page.text, words
    for words in ("mean of 3", "accuracy", "% of budget", "layers.0 to layers.11", "sits out"):
        assert words in page.labels, words
    assert len(page.pictures) == 5
    assert "losses" not in page.text, "lists of rounds are pictures, not text"


def nobody_replied(run: Run) -> None:
    run.round(1, away=run.names)
    run.writer.write("end", {"problem": "RuntimeError: nobody is there"})


def killed(run: Run) -> None:
    run.round(1)
    file = run.path / "events.jsonl"
    file.write_bytes(file.read_bytes()[:-40])


def diverged(run: Run) -> None:
    run.end(replicas_identical=False, fingerprints={"client-0": "1" * 16, "x": "2" * 16})


def started_again(run: Run) -> None:
    run.round(1, loss=0.0, seconds=0.0)
    del run.plan["budgets"], run.plan["memory"]
    run.start(1)
    run.round(2, loss=0.0)


@pytest.mark.parametrize(
    ("happens", "words"),
    [
        (nobody_replied, "Stopped after round 1: RuntimeError: nobody is there"),
        (killed, "Round 0 of 9, under way."),
        (diverged, "the replicas are not all identical"),
        (started_again, "the server started again, after no end was written"),
    ],
)
def test_partial_runs(
    tmp_path: Path, draw: random.Random, happens: Callable[[Run], None], words: str
) -> None:
    names = [f"client-{n}" for n in range(draw.choice((1, 3)))]
    happens(Run(tmp_path, names, draw.randint(1, 30), 9, draw))
    assert words in Page(tmp_path).text


def test_a_file_without_a_start(tmp_path: Path) -> None:
    first = '{"event": "hm", "time": "2026-01-01T00:00:00Z", "schema": 1}'
    (tmp_path / "events.jsonl").write_text(f"{first}\nno json\n")
    (tmp_path / "summary.json").write_text("[no json")
    page = Page(tmp_path)
    assert "No server has started this run." in page.text
    assert "1 damaged lines were passed over." in page.text


def test_large_runs_make_pages_of_a_readable_size(tmp_path: Path, draw: random.Random) -> None:
    run = Run(tmp_path, [f"client-{n}" for n in range(300)], 90, 800, draw)
    for t in range(1, 801):
        failing = draw.sample(run.names, 3)
        run.round(t, failures=dict.fromkeys(failing, f"answered after {t} s"))
    page = Page(tmp_path)
    assert len(page.source) < 1_500_000
    assert "Each column is the worst of about 2 rounds." in page.text
    assert "Only the first 200 of 300 clients are shown." in page.text


def test_one_absurd_loss_leaves_the_rest_to_be_seen(tmp_path: Path, draw: random.Random) -> None:
    run = Run(tmp_path, ["ada", "bob"], 4, 40, draw)
    for t in range(1, 41):
        run.round(t, **({"loss": 3e38, "losses": {"ada": 3e38}} if t == 17 else {}))
    page = Page(tmp_path)
    assert "1 rounds lie outside of the picture." in page.text
    assert not re.search(r"\d{9}", page.text + page.labels), "no endless figures"


def said(folder: Path, draw: random.Random, texts: list[str]) -> Page:
    """The page of a run in which everything that can say something says one of the texts."""
    run = Run(folder, texts, len(texts), 4, draw)
    plan = {**run.plan, "blocks": texts, "mask": ["1" * len(texts)] * len(texts)}
    facts = dict(zip(texts, texts, strict=True))
    run.start(0, job=texts[0], settings=facts, machine=facts, plan=plan)
    run.writer.write("evaluation", {"round": 0, texts[0]: 0.5, texts[1]: 0.6})
    run.round(1)
    run.round(2, failures=facts)
    run.round(3, refusals=facts, problem=texts[2])
    for text in texts:
        run.writer.write("fault", {"text": text, "client": text})
    run.end(failures=facts, fingerprints=facts)
    (folder / "summary.json").write_text(json.dumps(facts))
    return Page(folder)


def test_hostile_texts_are_text(tmp_path: Path, draw: random.Random) -> None:
    """Tag by tag and attribute by attribute it is the page of a harmless run."""
    harmless = [chr(ord("a") + n) * 9 for n in range(len(HOSTILE))]
    state = draw.getstate()
    page = said(tmp_path / "hostile", draw, list(HOSTILE))
    draw.setstate(state)
    other = said(tmp_path / "harmless", draw, harmless)
    assert page.tags == other.tags
    for drawn, plain in zip(page.pictures, other.pictures, strict=True):
        assert {element.tag for element in drawn.iter()} == {e.tag for e in plain.iter()}
    for text in HOSTILE:
        assert clean(text) in page.text, text
        assert short(clean(text)) in page.labels, text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", page.source + page.labels)


def test_command(tmp_path: Path, draw: random.Random) -> None:
    run = Run(tmp_path / "run", ["ada"], 2, 1, draw)
    run.round(1)
    out = tmp_path / "new" / "page.html"
    for options, page in (((), run.path / "report.html"), (("--out", out), out)):
        done = zorba("report", run.path, *options)
        assert done.exit_code == 0, done.output
        assert "wrote" in done.output
        assert page.is_file()
    refused = zorba("report", tmp_path)
    assert refused.exit_code == 1
    assert "there is no run at" in refused.output
    assert zorba("report", run.path, "--out", out / "x").exit_code == 1
