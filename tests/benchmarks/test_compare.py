"""The comparison's loop, counters and pictures, on a tiny random Llama."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from zorba.apps.reviews import data
from zorba.hf import find_blocks

from benchmarks.compare import report
from benchmarks.compare.loop import ROWS, Evaluation, Record, run
from benchmarks.compare.methods import make_method, plan_masks
from benchmarks.compare.settings import PLANS, SHARES, Settings
from benchmarks.compare.task import POOLED, AnswerLoss, Batch, batch_of, work_of
from benchmarks.experiment import Results
from tests.hf.tiny import build, case_of

ROUNDS = 4


@pytest.fixture
def settings(tmp_path: Path, threads: None) -> Settings:
    torch.set_num_threads(1)
    return Settings(batch_size=4, pool=12, longest=7, eps=1e-2, out=tmp_path / "out")


@pytest.fixture
def examples(generator: torch.Generator) -> dict[str, list[data.Example]]:
    def example(label: int) -> data.Example:
        length = int(torch.randint(3, 8, (), generator=generator))
        ids = torch.randint(3, 100, (length,), generator=generator).tolist()
        return data.Example(tuple(ids), label)

    return {name: [example(i % 2) for i in range(8 + n)] for n, name in enumerate(SHARES)}


@pytest.fixture
def train(settings, examples):
    """Runs a method on a replica of its own; returns the record, and the model before and after."""

    def run_it(name: str) -> tuple[Record, nn.Module, nn.Module]:
        loss = AnswerLoss(build(case_of("llama")), [5, 9])
        work = work_of(loss, examples, settings, PLANS[name].local_steps, name == "mezo")
        plan, before = plan_masks(loss.model, SHARES), copy.deepcopy(loss.model)
        masks = {c: [bool(a) for a in row] for c, row in zip(SHARES, plan.mask, strict=True)}
        method = make_method(name, work, settings, masks)
        batches = [batch_of(own) for own in examples.values()]
        evaluation = Evaluation(loss.score, batches[:1], batches, every=2)
        return run(method, list(work.sizes), ROUNDS, evaluation), before, loss.model

    return run_it


@pytest.mark.parametrize("name", PLANS)
def test_every_method_trains_and_is_scored(name: str, train) -> None:
    record, before, after = train(name)
    assert [r["loss"] > 0 for r in record.rounds] == [True] * ROUNDS
    seen = [(s["round"], s["sentences"]) for s in record.scores]
    assert seen == [(0, 8), (2, 8), (4, 8), (4, 92)]
    ids = torch.arange(3, 10)[None]
    assert not torch.equal(before(ids).logits, after(ids).logits)


def test_zorba_sends_scalars_and_keeps_frozen_weights(train) -> None:
    record, before, after = train("zorba")
    trained = {name for block in find_blocks(after) for name in block.parameters}
    for name, p in after.named_parameters():
        assert torch.equal(p, before.get_parameter(name)) == (name not in trained), name
    assert [r["up"] for r in record.rounds] == [4.0] * ROUNDS
    assert record.rounds[0]["down"] == 8  # the seed alone; then with the log entry before it
    assert all(8 < r["down"] < r["down_encoded"] for r in record.rounds[1:])


def test_the_budgets_are_shares_of_the_blocks() -> None:
    plan = plan_masks(build(case_of("llama")), {"small": 0.3, "large": 1.0})
    assert plan.mask.sum(axis=1).tolist() == [1, 3]
    assert min(plan.coverage) >= 1


def rows_of(batch: Batch) -> list[tuple[int, ...]]:
    pairs = zip(batch.ids.tolist(), batch.last.tolist(), strict=True)
    return [tuple(ids[: last + 1]) for ids, last in pairs]


def test_every_batch_of_a_client_comes_before_one_comes_again(settings, examples) -> None:
    work = work_of(AnswerLoss(nn.Identity(), [5, 9]), examples, settings, local_steps=2)
    client = list(SHARES)[-1]  # 12 of its 15 sentences: 3 batches
    batches = [work.batch(client, r, k) for r in (1, 2, 3) for k in (0, 1)]
    seen = [str(rows_of(batch)) for batch in batches]
    assert len(set(seen[:3])) == 3
    assert set(seen[:3]) == set(seen[3:])
    assert all(batch.labels.tolist() == [0, 1, 0, 1] for batch in batches)


def test_one_machine_trains_on_what_the_clients_train_on_together(settings, examples) -> None:
    loss = AnswerLoss(nn.Identity(), [5, 9])
    apart, pooled = (work_of(loss, examples, settings, 1, together) for together in (False, True))
    assert set(apart.sizes.values()) == {settings.pool}
    assert pooled.sizes == {POOLED: settings.pool * len(examples)}
    for round_ in (1, 2, 5):
        own = [row for name in apart.sizes for row in rows_of(apart.batch(name, round_, 0))]
        assert rows_of(pooled.batch(POOLED, round_, 0)) == own


def test_results_are_kept_shown_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "results" / "compare.json"
    cost = {"loss": 0.7, "seconds": 1.0, "up": 4.0, "up_encoded": 62.0, "down": 20.0}
    rounds = [{**cost, "down_encoded": 99.0}] * 3
    points = [(0, 10, 0.5), (3, 10, 0.6), (3, 40, 0.75)]
    Results(path).put("start", {"accuracy": 0.52, "auc": 0.7})
    scores = [{"round": r, "sentences": n, "accuracy": a, "auc": a} for r, n, a in points]
    for name in ("zorba", "decomfl"):
        Results(path).put("methods", {name: {"rounds": rounds, "scores": scores}})
    for at, row in enumerate(ROWS[::2]):
        seen = {"peak_bytes": (at + 1) << 28, "seconds_round": 0.5}
        Results(path).put("clients", {row.key: seen})
    results = Results(path).data
    assert results == json.loads(path.read_text())
    console = Console(record=True, width=200)
    report.print_table(console, results)
    text = console.export_text()
    said = ("before: accuracy 0.520, AUC 0.700", "0.750", "4 (62)", "ZorBA, 25% of the blocks")
    assert all(part in text for part in said)
    for draw in (report.draw_accuracy, report.draw_costs):
        draw(tmp_path / "picture.png", results)
        assert (tmp_path / "picture.png").stat().st_size > 0
        (tmp_path / "picture.png").unlink()


def test_runs_are_made_once_and_only_with_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    assert Results(path, {"rounds": 3}).run("one", lambda: {"loss": math.nan}) == {"loss": None}
    again = Results(path, {"rounds": 3})
    assert again.run("one", lambda: pytest.fail("made again")) == {"loss": None}
    assert again.data["machine"]["torch"] == torch.__version__
    with pytest.raises(SystemExit, match="other settings"):
        Results(path, {"rounds": 4})
