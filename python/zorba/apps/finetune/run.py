"""Runs a fine-tune from files to files."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from zorba import machine
from zorba.apps.finetune import data
from zorba.apps.finetune.objective import Objective, Score
from zorba.apps.finetune.report import Curves, lines, write_report
from zorba.apps.finetune.settings import FinetuneSettings
from zorba.apps.finetune.task import device_of, load_model, make_objective, read_data
from zorba.apps.progress import progress_bar
from zorba.hf import find_blocks
from zorba.log import TrajectoryWriter
from zorba.offload import Offload
from zorba.optim import ZerothOrderSGD
from zorba.optim.select import block_mask


def run_finetune(settings: FinetuneSettings, console: Console | None = None) -> dict[str, Any]:
    """Fine-tunes a model and returns what ``metrics.json`` holds.

    Raises:
        ValueError: settings, data or model that do not fit; nothing was written.
        OSError: a file that cannot be read or written, or a model that is not found.
    """
    console = console or Console()
    _check_out(settings)
    if settings.offload is not None and settings.blocks == "all":
        raise ValueError("offload is for idle blocks, and blocks is 'all': give blocks last:N")
    rows, evaluation, labels = read_data(settings)
    console.print(f"data: {len(rows)} rows to train on, {len(evaluation)} to evaluate on")
    if labels:
        said = ", ".join(f"{a} = {b!r}" for a, b in zip(labels, settings.words, strict=True))
        console.print(f"labels: {said}", highlight=False)
    model, tokenizer = load_model(settings)
    with _offloaded(model, settings):
        return _finetune(settings, model, tokenizer, rows, evaluation, console)


def _finetune(
    settings: FinetuneSettings,
    model: Any,
    tokenizer: Any,
    rows: list[data.Row],
    evaluation: list[data.Row],
    console: Console,
) -> dict[str, Any]:
    objective = make_objective(settings, model, tokenizer)
    optimizer = ZerothOrderSGD(
        model,
        lr=settings.lr,
        eps=settings.eps,
        num_perturbations=settings.perturbations,
        estimator=settings.estimator,  # type: ignore[arg-type]
        distribution=settings.distribution,  # type: ignore[arg-type]
        placement=settings.placement,  # type: ignore[arg-type]
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        clip=settings.clip,
        blocks=settings.blocks,
        seed=settings.seed,
    )
    active = optimizer.placement.table
    console.print(
        f"model: {settings.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M "
        f"parameters, {active.numel / 1e6:.1f} M active, {next(model.parameters()).dtype} on "
        f"{active.device}"
    )
    settings.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if settings.save != "model":
            writer = TrajectoryWriter.create(
                settings.out / "trajectory.zot",
                active,
                settings.seed,
                settings.distribution,  # type: ignore[arg-type]
                "stochastic",
                model=model,
                settings={k: str(v) for k, v in asdict(settings).items()},
            )
            optimizer.recorder = stack.enter_context(writer)
        summary, curves = _train(settings, objective, optimizer, rows, evaluation, console)
    return _finish(settings, model, tokenizer, summary, curves, console)


def _check_out(settings: FinetuneSettings) -> None:
    taken = [settings.out / name for name in ("model", "trajectory.zot", "metrics.json")]
    there = [str(path) for path in taken if path.exists()]
    if there:
        raise ValueError(f"{', '.join(there)} exists: give another folder with --out")


def _offloaded(model: Any, settings: FinetuneSettings) -> AbstractContextManager[Any]:
    """Context in which idle blocks are off the device, where that was asked for."""
    if settings.offload is None:
        return nullcontext()
    found = find_blocks(model)
    mask = block_mask(settings.blocks, len(found))
    active = [block.name for block, on in zip(found, mask, strict=True) if on]
    return Offload(model, active, device_of(settings), settings.offload)


def _batches(rows: list[data.Row], size: int, seed: int) -> Iterator[list[data.Row]]:
    """Every row once in a random order, then in another one."""
    order = random.Random(seed)
    while True:
        shuffled = order.sample(rows, len(rows))
        whole = len(rows) - len(rows) % size or len(rows)
        for start in range(0, whole, size):
            yield shuffled[start : start + size]


def _train(
    settings: FinetuneSettings,
    objective: Objective,
    optimizer: ZerothOrderSGD,
    rows: list[data.Row],
    evaluation: list[data.Row],
    console: Console,
) -> tuple[dict[str, Any], Curves]:
    curves = Curves()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 - t / settings.steps)
    batches = _batches(rows, settings.batch_size, settings.seed)
    machine.reset_peak_memory()
    seconds = kernel = 0.0
    with progress_bar(console, "{task.fields[note]}") as progress:
        bar = progress.add_task("fine-tune", total=settings.steps, note="")

        def evaluate(step: int) -> None:
            if evaluation:
                progress.update(bar, note="evaluating")
                score = objective.score(evaluation, 4 * settings.batch_size)
                curves.scores.append((step, score))
                progress.console.print(f"step {step}: {_said(score)}", highlight=False)

        evaluate(0)
        for step in range(1, settings.steps + 1):
            batch = objective.encode(next(batches))
            optimizer.step(lambda batch=batch: objective.loss(batch))  # type: ignore[misc]
            schedule.step()
            report = optimizer.last_step
            assert report is not None
            curves.losses.append(report.loss)
            curves.skipped += report.skipped
            seconds += report.seconds
            kernel += report.kernel_seconds
            progress.update(bar, advance=1, note=f"loss {report.loss:.3f}")
            due = settings.eval_every and step % settings.eval_every == 0
            if due or step == settings.steps:
                optimizer.flush()
                evaluate(step)
    summary = {
        "settings": asdict(settings),
        "machine": machine.describe(),
        "steps": settings.steps,
        "step_seconds": seconds / settings.steps,
        "kernel_seconds": kernel / settings.steps,
        "peak_memory_bytes": machine.peak_memory(),
    }
    return summary, curves


def _finish(
    settings: FinetuneSettings,
    model: Any,
    tokenizer: Any,
    summary: dict[str, Any],
    curves: Curves,
    console: Console,
) -> dict[str, Any]:
    written: list[Path] = []
    if settings.save != "model":
        written.append(settings.out / "trajectory.zot")
        summary["trajectory_bytes"] = written[0].stat().st_size
    if settings.save != "trajectory":
        written.append(settings.out / "model")
        model.save_pretrained(written[-1])
        tokenizer.save_pretrained(written[-1])
    written += write_report(settings.out, summary, curves)
    table = Table(title=f"Zeroth-order fine-tune of {settings.model}", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in lines(summary, curves):
        table.add_row(name, value)
    console.print(table)
    console.print("wrote " + ", ".join(map(str, written)), highlight=False)
    return summary


def _said(score: Score) -> str:
    accuracy = "" if score.accuracy is None else f", accuracy {score.accuracy:.3f}"
    return f"evaluation loss {score.loss:.4f}{accuracy}"
