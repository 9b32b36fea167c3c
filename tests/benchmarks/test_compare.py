"""The comparison's loop, resuming, counters and pictures, on a tiny random Llama."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from zorba.apps.reviews import data
from zorba.hf import find_blocks

from benchmarks.compare import report
from benchmarks.compare.apart import ROWS
from benchmarks.compare.loop import Evaluation, Record, run
from benchmarks.compare.methods import make_method, plan_masks
from benchmarks.compare.settings import PLANS, SHARES, Settings
from benchmarks.compare.task import POOLED, AnswerLoss, Batch, batch_of, work_of
from benchmarks.kept_runs import KeptRuns, Results
from benchmarks.peers.method import Method
from tests.hf.tiny import build, case_of

ROUNDS = 4


@pytest.fixture
def settings(tmp_path: Path, threads: None) -> Settings:
    torch.set_num_threads(1)
    return Settings(batch_size=4, pool=12, longest=7, eps=1e-2, out=tmp_path / "out")


@pytest.fixture
def examples(generator: torch.Generator) -> dict[str, list[data.Example]]:
    """Eight clients with 8 to 15 sentences each."""

    def example(label: int) -> data.Example:
        length = int(torch.randint(3, 8, (), generator=generator))
        ids = torch.randint(3, 100, (length,), generator=generator).tolist()
        return data.Example(tuple(ids), label)

    return {name: [example(i % 2) for i in range(8 + n)] for n, name in enumerate(SHARES)}


class Run:
    """A method on a replica of its own."""

    def __init__(self, name: str, settings: Settings, examples: dict[str, list[data.Example]]):
        self.plan = settings.methods[name]
        self.loss = AnswerLoss(build(case_of("llama")), [5, 9])
        self.work = work_of(
            self.loss, examples, settings, self.plan.local_steps, together=name == "mezo"
        )
        plan = plan_masks(self.loss.model, SHARES)
        masks = {c: [bool(a) for a in row] for c, row in zip(SHARES, plan.mask, strict=True)}
        self.method: Method = make_method(name, self.work, settings, masks)
        batches = [batch_of(own) for own in examples.values()]
        self.evaluation = Evaluation(self.loss.score, batches[:1], batches, every=2)
        self.keep = settings.out / f"{name}.pt"

    def run(self, resume: bool = False, until: float = float("inf")) -> tuple[Record, bool]:
        clients = list(self.work.clients)
        return run(self.method, clients, ROUNDS, self.evaluation, self.keep, resume, until=until)

    def logits(self) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([self.loss.logits(batch) for batch in self.evaluation.whole])


@pytest.mark.parametrize("name", PLANS)
def test_a_run_that_is_stopped_continues_where_it_was(
    name: str, settings: Settings, examples: dict[str, list[data.Example]]
) -> None:
    whole = Run(name, settings, examples)
    start = whole.logits()
    record, ended = whole.run()
    assert ended
    assert [r["loss"] > 0 for r in record.rounds] == [True] * ROUNDS
    assert [s["round"] for s in record.scores] == [0, 2, 4, 4]
    assert not torch.equal(start, whole.logits())

    other = replace(settings, out=settings.out / "other")
    first = Run(name, other, examples)
    stopped, ended = first.run(until=0.0)
    assert not ended
    assert len(stopped.rounds) == 1
    second = Run(name, other, examples)
    again, ended = second.run(resume=True)
    assert ended
    # Peers come back from a perturbation to rounding, and that is not repeated when they resume.
    for one, two in zip(record.rounds, again.rounds, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-4)
        for way in ("up", "down"):
            assert one[way] == two[way]
    torch.testing.assert_close(whole.logits(), second.logits(), rtol=0, atol=1e-4)


def test_zorba_sends_scalars_and_keeps_frozen_weights(
    settings: Settings, examples: dict[str, list[data.Example]]
) -> None:
    one = Run("zorba", settings, examples)
    before = copy.deepcopy(dict(one.loss.model.named_parameters()))
    record, _ = one.run()
    trained = {name for block in find_blocks(one.loss.model) for name in block.parameters}
    for name, p in one.loss.model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in trained), name
    assert [r["up"] for r in record.rounds] == [4.0] * ROUNDS
    assert record.rounds[0]["down"] == 8  # the seed alone; then with the log entry before it
    assert all(8 < r["down"] < r["down_encoded"] for r in record.rounds[1:])


def test_the_budgets_are_shares_of_the_blocks() -> None:
    model = build(case_of("llama"))
    plan = plan_masks(model, {"small": 0.3, "large": 1.0})
    assert plan.mask.sum(axis=1).tolist() == [1, 3]
    assert min(plan.coverage) >= 1


def test_every_batch_of_a_client_comes_before_one_comes_again(
    settings: Settings, examples: dict[str, list[data.Example]]
) -> None:
    work = work_of(AnswerLoss(nn.Identity(), [5, 9]), examples, settings, local_steps=2)
    client = list(SHARES)[-1]  # 12 of its 15 sentences: 3 batches
    seen = [work.batch(client, r, k) for r in (1, 2, 3) for k in (0, 1)]

    def key(batch: Batch) -> str:
        return str(batch.ids.tolist())

    assert len({key(b) for b in seen[:3]}) == 3
    assert {key(b) for b in seen[:3]} == {key(b) for b in seen[3:]}
    assert all(b.labels.tolist() == [0, 0, 1, 1] for b in seen)


def test_one_machine_trains_on_what_the_clients_train_on_together(
    settings: Settings, examples: dict[str, list[data.Example]]
) -> None:
    loss = AnswerLoss(nn.Identity(), [5, 9])
    apart = work_of(loss, examples, settings, local_steps=1)
    pooled = work_of(loss, examples, settings, local_steps=1, together=True)
    assert set(apart.sizes.values()) == {settings.pool}
    assert pooled.sizes == {POOLED: settings.pool * len(examples)}

    def rows(batch: Batch) -> list[tuple[int, ...]]:
        pairs = zip(batch.ids.tolist(), batch.last.tolist(), strict=True)
        return [tuple(ids[: last + 1]) for ids, last in pairs]

    for round_ in (1, 2, 5):
        own = [row for name in apart.clients for row in rows(apart.batch(name, round_, 0))]
        assert rows(pooled.batch(POOLED, round_, 0)) == own


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
    assert set(results["methods"]) == {"zorba", "decomfl"}
    console = Console(record=True, width=200)
    report.print_table(console, results)
    text = console.export_text()
    assert "before: accuracy 0.520, AUC 0.700" in text
    assert "0.750" in text
    assert "4 (62)" in text
    report.draw_accuracy(tmp_path / "accuracy.png", results)
    report.draw_costs(tmp_path / "costs.png", results)
    assert (tmp_path / "accuracy.png").stat().st_size > 0
    assert (tmp_path / "costs.png").stat().st_size > 0


def test_runs_are_made_once_and_only_with_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    assert KeptRuns(path, {"rounds": 3}).get("one", lambda: {"loss": math.nan}) == {"loss": None}
    again = KeptRuns(path, {"rounds": 3})
    assert again.get("one", lambda: pytest.fail("made again")) == {"loss": None}
    assert again.data["machine"]["torch"] == torch.__version__
    with pytest.raises(SystemExit, match="other settings"):
        KeptRuns(path, {"rounds": 4})
