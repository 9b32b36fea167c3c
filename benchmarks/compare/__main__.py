"""Compares ZorBA with federated baselines on one machine.

python -m benchmarks.compare                 everything, from the start
python -m benchmarks.compare zorba decomfl   these methods
python -m benchmarks.compare clients         memory and time of a client of each method
python -m benchmarks.compare report          table and pictures of what is there
"""

from __future__ import annotations

import time
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
from benchmarks.compare.apart import ROWS, measure
from benchmarks.compare.loop import Evaluation, Record, run
from benchmarks.compare.methods import make_method, plan_masks
from benchmarks.compare.settings import PLANS, SHARES, Settings
from benchmarks.compare.task import AnswerLoss, Data, load_model, read_data, work_of
from benchmarks.kept_runs import Results

_TABLE_WIDTH = 120  # the table is unreadable in less, for example where output goes to a file
What = Literal["zorba", "fedavg-lora", "decomfl", "fedkseed", "mezo", "clients", "report"]


class Compare:
    """A comparison: settings, results, and where it speaks."""

    def __init__(self, settings: Settings, results: Results, console: Console) -> None:
        self.settings, self.results, self.console = settings, results, console
        self.folder = packages.fetch_model(settings.cache)

    @cached_property
    def data(self) -> Data:
        """Text, read when a method first needs it."""
        return read_data(self.settings)

    @cached_property
    def plan(self) -> BlockPlan:
        """ZorBA's plan."""
        return plan_masks(load_model(self.folder), SHARES)

    def mask_of(self, client: str) -> list[bool]:
        """Blocks that a client activates; all of them for one that is not in the plan."""
        if client not in SHARES:
            return [True] * len(self.plan.blocks)
        return [bool(on) for on in self.plan.mask[list(SHARES).index(client)]]

    def keep(self, part: str, key: str, value: dict[str, Any]) -> None:
        """Writes a result down, with its machine and settings."""
        left_out = ("methods", "out", "cache")
        common = {k: v for k, v in asdict(self.settings).items() if k not in left_out}
        versions = machine.describe() | {"peft": machine.version_of("peft")}
        self.results.put(part, {key: {**value, "machine": versions, "settings": common}})

    def measure_clients(self, resume: bool, until: float) -> None:
        """Measures a client of each method in a process of its own."""
        for row in ROWS:
            done = resume and row.key in self.results.part("clients")
            if not done and time.monotonic() < until:
                seen = measure(row, self.mask_of(row.client), self.settings, self.folder)
                self.keep("clients", row.key, seen)
                size, seconds = seen["peak_bytes"] / 2**20, seen["seconds_round"]
                name = report.label_of(row)
                self.console.print(f"{name}: {size:,.0f} MiB, {seconds:.2f} s a round")

    def train(self, name: str, resume: bool, until: float) -> None:
        """Runs a method to its end, or until time is up."""
        plan = self.settings.methods[name]
        kept = self.results.part("methods").get(name, {}).get("rounds", [])
        if resume and len(kept) == plan.rounds:
            return
        data = self.data
        loss = AnswerLoss(load_model(self.folder), data.answers)
        own_memory(loss.model, "cpu")
        work = work_of(loss, data.clients, self.settings, plan.local_steps, name == "mezo")
        masks = {client: self.mask_of(client) for client in work.clients}
        method = make_method(name, work, self.settings, masks)
        if not self.results.part("start"):
            start = loss.score(data.evaluation)
            self.results.put("start", {"accuracy": start.accuracy, "auc": start.auc})
        with progress_bar(self.console) as progress:
            bar = progress.add_task(plan.title, total=plan.rounds, note="")
            record, ended = run(
                method,
                list(work.clients),
                plan.rounds,
                Evaluation(loss.score, data.subset, data.evaluation, plan.every),
                self.settings.out / f"{name}.pt",
                resume,
                lambda r: progress.update(bar, completed=len(r.rounds), note=_note(r)),
                until,
            )
        if ended:
            own = {"title": plan.title, "local_steps": plan.local_steps, "options": plan.options}
            self.keep("methods", name, {**own, **asdict(record)})

    def report(self, images: Path) -> None:
        """Prints the table and draws the pictures of all that was measured so far."""
        data = {part: self.results.part(part) for part in ("start", "methods", "clients")}
        report.print_table(self.console, data)
        if data["methods"]:
            report.draw_accuracy(images / "compare-accuracy.png", data)
        if data["clients"]:
            report.draw_costs(images / "compare-costs.png", data)
        draw_plan(self.plan, images / "compare-plan.png")


def _note(record: Record) -> str:
    loss = f"loss {record.rounds[-1]['loss']:.3f}, " if record.rounds else ""
    return f"{loss}accuracy {record.scores[-1]['accuracy']:.3f}" if record.scores else loss


def main(
    what: tyro.conf.Positional[tuple[What, ...]] = (),
    resume: bool = False,
    minutes: float = float("inf"),
    results: Path = Path("benchmarks/results/compare.json"),
    images: Path = Path("docs/images"),
) -> None:
    """Compares ZorBA with federated baselines on one machine.

    Args:
        what: Methods to run, ``clients`` to measure, or ``report`` to show; all by default.
        resume: Continue runs that were stopped.
        minutes: Stop after this long.
        results: JSON file.
        images: Folder for the pictures.
    """
    console = Console()
    console.width = max(console.width, _TABLE_WIDTH)
    compare = Compare(Settings(), Results(results), console)
    until = time.monotonic() + 60 * minutes
    if "report" not in what:
        if not what or "clients" in what:
            compare.measure_clients(resume, until)
        for name in PLANS:
            if (not what or name in what) and time.monotonic() < until:
                compare.train(name, resume, until)
    compare.report(images)


if __name__ == "__main__":
    tyro.cli(main)
