"""Compares ZorBA with federated baselines on one machine.

python -m benchmarks.compare                 everything, from the start
python -m benchmarks.compare zorba decomfl   these methods
python -m benchmarks.compare clients         memory and time of a client of each method
python -m benchmarks.compare report          table and pictures of what is there
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from zorba import machine
from zorba.apps.command import progress_bar
from zorba.apps.plan.measure import own_memory
from zorba.apps.reviews import packages
from zorba.planning import BlockPlan, draw_plan

from benchmarks.compare import report
from benchmarks.compare.loop import ROWS, Evaluation, Record, measure, run
from benchmarks.compare.methods import make_method, plan_masks
from benchmarks.compare.settings import PLANS, SHARES, Settings
from benchmarks.compare.task import AnswerLoss, Data, load_model, read_data, work_of
from benchmarks.experiment import Results

RESULTS, IMAGES = Path("benchmarks/results/compare.json"), Path("docs/images")
TABLE_WIDTH = 140  # the table is unreadable in less, for example where output goes to a file
What = Literal["zorba", "fedavg-lora", "decomfl", "fedkseed", "mezo", "clients", "report"]


class Compare:
    """A comparison: settings, results, and where it speaks."""

    def __init__(self) -> None:
        self.settings, self.results, self.console = Settings(), Results(RESULTS), Console()
        self.console.width = max(self.console.width, TABLE_WIDTH)
        self.folder = packages.fetch_model(self.settings.cache)

    @cached_property
    def data(self) -> Data:
        return read_data(self.settings)

    @cached_property
    def plan(self) -> BlockPlan:
        return plan_masks(load_model(self.folder), SHARES)

    def mask_of(self, client: str) -> list[bool]:
        """Blocks that a client activates; all of them for one that is not in the plan."""
        if client not in SHARES:
            return [True] * len(self.plan.blocks)
        return [bool(on) for on in self.plan.mask[list(SHARES).index(client)]]

    def keep(self, part: str, key: str, value: dict[str, Any]) -> None:
        settings = {k: v for k, v in asdict(self.settings).items() if k not in ("out", "cache")}
        versions = machine.describe() | {"peft": machine.version_of("peft")}
        self.results.put(part, {key: {**value, "machine": versions, "settings": settings}})

    def measure_clients(self, resume: bool) -> None:
        for row in ROWS:
            if not resume or row.key not in self.results.part("clients"):
                seen = measure(row, self.mask_of(row.client), self.settings, self.folder)
                self.keep("clients", row.key, seen)
                size, seconds = seen["peak_bytes"] / 2**20, seen["seconds_round"]
                said = f"{size:,.0f} MiB, {seconds:.2f} s a round"
                self.console.print(f"{report.label_of(row)}: {said}")

    def train(self, name: str) -> None:
        plan, data = PLANS[name], self.data
        loss = AnswerLoss(load_model(self.folder), data.answers)
        own_memory(loss.model, "cpu")
        work = work_of(loss, data.clients, self.settings, plan.local_steps, name == "mezo")
        masks = {client: self.mask_of(client) for client in work.sizes}
        method = make_method(name, work, self.settings, masks)
        if not self.results.part("start"):
            start = loss.score(data.evaluation)
            self.results.put("start", {"accuracy": start.accuracy, "auc": start.auc})
        evaluation = Evaluation(loss.score, data.subset, data.evaluation, plan.every)
        with progress_bar(self.console) as progress:
            bar = progress.add_task(plan.title, total=plan.rounds, note="")

            def show(record: Record) -> None:
                loss = f"loss {record.rounds[-1]['loss']:.3f}, " if record.rounds else ""
                note = f"{loss}accuracy {record.scores[-1]['accuracy']:.3f}"
                progress.update(bar, completed=len(record.rounds), note=note)

            record = run(method, list(work.sizes), plan.rounds, evaluation, show)
        own = {"title": plan.title, "local_steps": plan.local_steps, "options": plan.options}
        self.keep("methods", name, {**own, **asdict(record)})

    def report(self) -> None:
        data = {part: self.results.part(part) for part in ("start", "methods", "clients")}
        report.print_table(self.console, data)
        if data["methods"]:
            report.draw_accuracy(IMAGES / "compare-accuracy.png", data)
        if data["clients"]:
            report.draw_costs(IMAGES / "compare-costs.png", data)
        draw_plan(self.plan, IMAGES / "compare-plan.png")


def main(what: tyro.conf.Positional[tuple[What, ...]] = (), resume: bool = False) -> None:
    """Compares ZorBA with federated baselines on one machine.

    Args:
        what: Methods to run, ``clients`` to measure, or ``report`` to show; all by default.
        resume: Leave out the methods and clients that have a result.
    """
    compare = Compare()
    if "report" not in what:
        if not what or "clients" in what:
            compare.measure_clients(resume)
        for name in PLANS:
            done = resume and name in compare.results.part("methods")
            if not done and (not what or name in what):
                compare.train(name)
    compare.report()


if __name__ == "__main__":
    tyro.cli(main)
