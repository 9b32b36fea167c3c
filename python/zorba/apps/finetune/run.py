"""Runs a fine-tune from files to files."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from zorba import machine
from zorba.apps.finetune.report import lines, write_report
from zorba.apps.finetune.settings import FinetuneSettings
from zorba.apps.finetune.task import device_of, load_model, make_objective, read_data
from zorba.apps.finetune.trainer import FinetuneTrainer
from zorba.apps.progress import hide_library_bars, plain_console, progress_bar
from zorba.hf import find_blocks
from zorba.offload import Offload
from zorba.optim import active_parameters
from zorba.optim.options import block_mask


def run_finetune(settings: FinetuneSettings, console: Console | None = None) -> dict[str, Any]:
    """Fine-tunes a model and returns the content of ``metrics.json``.

    Raises:
        ValueError: data or model that do not fit, or files of another run; nothing was written.
        OSError: a file that cannot be read or written, or a model that is not found.
    """
    console = console or plain_console()
    hide_library_bars()
    # A run takes hours: it neither overwrites another one nor finds out at its end that it would.
    taken = [settings.out / name for name in ("model", "trajectory.zot", "metrics.json")]
    there = [str(path) for path in taken if path.exists()]
    if there:
        raise ValueError(f"{', '.join(there)} exists: give another folder with --out")
    if settings.offload is not None and settings.blocks == "all":
        raise ValueError("offload is for idle blocks, and blocks is 'all': give blocks last:N")
    rows, evaluation, labels = read_data(settings)
    console.print(f"data: {len(rows)} rows to train on, {len(evaluation)} to evaluate on")
    if labels:
        said = ", ".join(f"{a} = {b!r}" for a, b in zip(labels, settings.words, strict=True))
        console.print(f"labels: {said}")
    model, tokenizer = load_model(settings)
    with _offloaded(model, settings):
        # The objective and the blocks are checked before the trainer makes the folder.
        objective = make_objective(settings, model, tokenizer)
        console.print(_describe(model, settings))
        machine.reset_peak_memory()
        with progress_bar(console, "{task.fields[note]}") as progress:
            trainer = FinetuneTrainer(model, objective, settings, rows, evaluation, progress)
            trainer.train()
            # The trainer evaluates at multiples of eval_every; the last step may be none.
            if evaluation and trainer.evaluations[-1]["step"] != settings.steps:
                trainer.evaluate()
        metrics = _metrics(settings, trainer)
        written = []
        if settings.save != "model":
            written.append(settings.out / "trajectory.zot")
            metrics["trajectory_bytes"] = written[0].stat().st_size
        if settings.save != "trajectory":
            written.append(settings.out / "model")
            model.save_pretrained(written[-1])
            tokenizer.save_pretrained(written[-1])
    written += write_report(settings.out, metrics)
    table = Table(title=f"Zeroth-order fine-tune of {settings.model}", show_header=False)
    for row in lines(metrics):
        table.add_row(*row)
    console.print(table)
    console.print("wrote " + ", ".join(map(str, written)))
    return metrics


def _offloaded(model: Any, settings: FinetuneSettings) -> AbstractContextManager[Any]:
    """Context in which idle blocks are off the device, where that was asked for."""
    if settings.offload is None:
        return nullcontext()
    found = find_blocks(model)
    mask = block_mask(settings.blocks, len(found))
    active = [block.name for block, on in zip(found, mask, strict=True) if on]
    return Offload(model, active, device_of(settings), settings.offload)


def _describe(model: Any, settings: FinetuneSettings) -> str:
    active = list(active_parameters(model, settings.blocks).values())
    every, trained = (sum(p.numel() for p in some) / 1e6 for some in (model.parameters(), active))
    return (
        f"model: {settings.model}, {every:.1f} M parameters, {trained:.1f} M active, "
        f"{active[0].dtype} on {active[0].device}"
    )


def _metrics(settings: FinetuneSettings, trainer: FinetuneTrainer) -> dict[str, Any]:
    reports = trainer.reports
    return {
        "settings": asdict(settings),
        "machine": machine.describe(),
        "steps": settings.steps,
        "step_seconds": sum(report.seconds for report in reports) / len(reports),
        "kernel_seconds": sum(report.kernel_seconds for report in reports) / len(reports),
        "peak_memory_bytes": machine.peak_memory(),
        "skipped": sum(report.skipped for report in reports),
        "losses": [report.loss for report in reports],
        "evaluations": trainer.evaluations,
    }
