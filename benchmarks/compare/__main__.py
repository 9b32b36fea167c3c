"""Compares ZorBA with federated baselines on one machine.

python -m benchmarks.compare                 everything, from the start
python -m benchmarks.compare zorba decomfl   these methods
python -m benchmarks.compare clients         memory and time of a client of each method
python -m benchmarks.compare report          table and pictures of what is there
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import TimeElapsedColumn
from zorba.apps.plan.measure import own_memory
from zorba.apps.progress import progress_bar
from zorba.apps.reviews import packages
from zorba.planning import BlockPlan, draw_plan

from benchmarks.compare import report
from benchmarks.compare.apart import ROWS, measure
from benchmarks.compare.loop import Evaluation, Record, run
from benchmarks.compare.methods import make_method
from benchmarks.compare.results import Results
from benchmarks.compare.settings import PLANS, SHARES, Settings
from benchmarks.compare.task import AnswerLoss, Data, load_model, read_data, work_of
from benchmarks.compare.zorba_method import plan_masks

CLIENTS, REPORT = "clients", "report"
_TABLE_WIDTH = 120  # the table is unreadable in less, for example where output goes to a file


def main() -> None:
    """Runs what the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="*", choices=[*PLANS, CLIENTS, REPORT, []], metavar="WHAT")
    parser.add_argument("--resume", action="store_true", help="continue runs that were stopped")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this long")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/compare.json"))
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    given = parser.parse_args()
    console = Console()
    console.width = max(console.width, _TABLE_WIDTH)
    compare = Compare(Settings(), Results(given.results), console)
    compare.run(given.what, given.resume, time.monotonic() + 60 * given.minutes)
    compare.report(given.images)


class Compare:
    """A comparison: settings, results, and where it speaks."""

    def __init__(self, settings: Settings, results: Results, console: Console) -> None:
        self.settings, self.results, self.console = settings, results, console
        self.folder = packages.fetch_model(settings.cache)
        self._data: Data | None = None
        self._plan: BlockPlan | None = None

    @property
    def data(self) -> Data:
        """Text, read when a method first needs it."""
        if self._data is None:
            self._data = read_data(self.settings)
        return self._data

    @property
    def plan(self) -> BlockPlan:
        """ZorBA's plan."""
        if self._plan is None:
            self._plan = plan_masks(load_model(self.folder), SHARES)
        return self._plan

    def mask_of(self, client: str) -> list[bool]:
        """Blocks that a client activates; all of them for one that is not in the plan."""
        if client not in SHARES:
            return [True] * len(self.plan.blocks)
        return [bool(on) for on in self.plan.mask[list(SHARES).index(client)]]

    def run(self, what: list[str], resume: bool, until: float) -> None:
        """Runs methods and measures clients, until time is up."""
        if REPORT in what:
            return
        if not what or CLIENTS in what:
            self._clients(resume, until)
        for name in PLANS:
            if (not what or name in what) and time.monotonic() < until:
                self._method(name, resume, until)

    def report(self, images: Path) -> None:
        """Prints the table and draws the pictures of all that was measured so far."""
        data = self.results.data
        report.print_table(self.console, data)
        images.mkdir(parents=True, exist_ok=True)
        if data["methods"]:
            report.draw_accuracy(images / "compare-accuracy.png", data)
        if data["clients"]:
            report.draw_costs(images / "compare-costs.png", data)
        draw_plan(self.plan, images / "compare-plan.png")

    def _clients(self, resume: bool, until: float) -> None:
        for row in ROWS:
            done = self.results.data["clients"]
            if (resume and row.key in done) or time.monotonic() >= until:
                continue
            seen = measure(row, self.mask_of(row.client), self.settings, self.folder)
            self.results.add("clients", row.key, seen, self.settings)
            self.console.print(
                f"{report.label_of(row)}: {seen['peak_bytes'] / 2**20:,.0f} MiB, "
                f"{seen['seconds_round']:.2f} s a round"
            )

    def _method(self, name: str, resume: bool, until: float) -> None:
        plan = self.settings.methods[name]
        if (
            resume
            and len(self.results.data["methods"].get(name, {}).get("rounds", [])) == plan.rounds
        ):
            return
        data = self.data
        loss = AnswerLoss(load_model(self.folder), data.answers)
        own_memory(loss.model, "cpu")
        together = name == "mezo"
        work = work_of(loss, data.clients, self.settings, plan.local_steps, together)
        masks = {client: self.mask_of(client) for client in work.clients}
        method = make_method(name, work, self.settings, masks)
        if not self.results.data["start"]:
            start = loss.score(data.evaluation)
            self.results.add_start(start.accuracy, start.auc)
        note = "{task.fields[note]}"
        with progress_bar(self.console, note, TimeElapsedColumn()) as progress:
            bar = progress.add_task(plan.title, total=plan.rounds, note="")
            record, ended = run(
                method,
                list(work.clients),
                plan.rounds,
                Evaluation(loss.score, data.subset, data.evaluation, plan.every),
                self.settings.out / f"{name}.pt",
                resume,
                lambda record: progress.update(
                    bar, completed=len(record.rounds), note=_note(record)
                ),
                until,
            )
        if ended:
            self.results.add("methods", name, _result(record, plan), self.settings)


def _result(record: Record, plan: Any) -> dict[str, Any]:
    own = {"title": plan.title, "local_steps": plan.local_steps, "options": plan.options}
    return {**own, "rounds": record.rounds, "scores": record.scores}


def _note(record: Record) -> str:
    loss = f"loss {record.rounds[-1]['loss']:.3f}, " if record.rounds else ""
    return f"{loss}accuracy {record.scores[-1]['accuracy']:.3f}" if record.scores else loss


if __name__ == "__main__":
    main()
