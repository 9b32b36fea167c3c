"""Runs a fine-tune from files to files: model, trajectory, metrics.json and loss.png."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from transformers import PrinterCallback

from zorba import machine
from zorba.apps import command
from zorba.apps.finetune import task
from zorba.apps.finetune.settings import FinetuneSettings
from zorba.hf import find_blocks
from zorba.hf.trainer import ZOArguments, ZOTrainer
from zorba.offload import Offload
from zorba.optim import StepReport, active_parameters


def run_finetune(settings: FinetuneSettings, console: Console | None = None) -> dict[str, Any]:
    """Fine-tunes a model and returns the content of ``metrics.json``.

    ValueError or OSError: data or model that do not fit, or files of another run.
    """
    console = console or command.plain_console()
    command.hide_library_bars()
    # A run takes hours: it neither overwrites another one nor finds out at its end that it would.
    out = {name: settings.out / name for name in ("model", "trajectory.zot", "metrics.json")}
    if there := [str(path) for path in out.values() if path.exists()]:
        raise ValueError(f"{', '.join(there)} exists: give another folder with --out")
    if settings.offload is not None and settings.blocks == "all":
        raise ValueError("offload is for idle blocks, and blocks is 'all': give blocks last:N")
    rows, evaluation, labels = task.read_data(settings)
    console.print(f"data: {len(rows)} rows to train on, {len(evaluation)} to evaluate on")
    for label, word in zip(labels, settings.words, strict=True):
        console.print(f"label {label}: {word!r}")
    model, tokenizer = task.load_model(settings)
    active = active_parameters(model, settings.blocks)
    offload: Any = nullcontext()
    if settings.offload is not None:
        busy = [block.name for block in find_blocks(model) if active.keys() & block.parameters]
        offload = Offload(model, busy, task.device_of(settings), settings.offload)
    with offload:
        # The objective is checked before the trainer makes the folder.
        objective = task.make_objective(settings, model, tokenizer)
        every, few = model.num_parameters() / 1e6, sum(p.numel() for p in active.values()) / 1e6
        about = f"{every:.1f} M parameters, {few:.1f} M active, {model.dtype} on {model.device}"
        console.print(f"model: {settings.model}, {about}")
        with command.progress_bar(console) as progress:
            trainer = FinetuneTrainer(model, objective, settings, rows, evaluation, progress)
            machine.reset_peak_memory()
            trainer.score()
            trainer.train()
        if settings.save != "trajectory":
            model.save_pretrained(out["model"])
            tokenizer.save_pretrained(out["model"])
    reports = trainer.reports
    metrics: dict[str, Any] = {
        "settings": asdict(settings),
        "machine": machine.describe(),
        "step_seconds": sum(report.seconds for report in reports) / len(reports),
        "kernel_seconds": sum(report.kernel_seconds for report in reports) / len(reports),
        "peak_memory_bytes": machine.peak_memory(),
        "skipped": sum(report.skipped for report in reports),
        "losses": [report.loss for report in reports],
        "evaluations": trainer.evaluations,
    }
    step, passes = 1e3 * metrics["step_seconds"], 1e3 * metrics["kernel_seconds"]
    console.print(f"a step: {step:.0f} ms, {passes:.1f} ms of it passes over weights")
    console.print(f"skipped: {metrics['skipped']} steps, whose loss was not finite")
    console.print(f"peak memory of the process: {metrics['peak_memory_bytes'] / 2**20:,.0f} MiB")
    out["metrics.json"].write_text(json.dumps(metrics, indent=2, default=str) + "\n")
    out["loss.png"] = settings.out / "loss.png"
    _picture(metrics["losses"], trainer.evaluations).savefig(out["loss.png"], dpi=120)
    console.print("wrote " + ", ".join(str(path) for path in out.values() if path.exists()))
    return metrics


class FinetuneTrainer(ZOTrainer):
    """Trains by an objective, which makes batches of rows on the model's device."""

    def __init__(
        self,
        model: nn.Module,
        objective: task.Objective,
        settings: FinetuneSettings,
        rows: list[task.Row],
        evaluation: list[task.Row],  # to score before, between and after the steps; may be none
        progress: Progress,
    ) -> None:
        self.reports: list[StepReport] = []
        self.evaluations: list[dict[str, Any]] = []  # step, loss and accuracy
        self._objective, self._settings, self._evaluation = objective, settings, evaluation
        self._progress = progress
        self._bar = progress.add_task("fine-tune", total=settings.steps, note="")
        trajectory = None if settings.save == "model" else str(settings.out / "trajectory.zot")
        arguments = ZOArguments(
            output_dir=str(settings.out),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            dataloader_drop_last=len(rows) >= settings.batch_size,
            dataloader_pin_memory=False,
            remove_unused_columns=False,  # the fields of rows are the template's, not the model's
            learning_rate=settings.lr,
            weight_decay=settings.weight_decay,
            seed=settings.seed,
            # It writes nothing but the trajectory, and shows nothing.
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=settings.device == "cpu",
            zo_trajectory=trajectory,
            # An option of a step has the name of a setting behind its prefix.
            **{f"zo_{n}": v for n, v in vars(settings).items() if hasattr(ZOArguments, f"zo_{n}")},
        )
        # One device is used, whatever the machine has: ZOTrainer refuses several in one process.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        super().__init__(model, arguments, lambda some: {"batch": objective.encode(some)}, rows)
        self.remove_callback(PrinterCallback)
        # Offloaded blocks must stay on the host, and batches are already in place.
        self.accelerator.device_placement = False

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """Returns the objective's loss of a batch, float32 [], or of each row, float32 [rows]."""
        # No dropout, as in MeZO: it would add noise to differences of losses.
        model.eval()
        objective, batch = self._objective, inputs["batch"]
        if self._settings.directions == "shared":
            return objective(batch)
        if isinstance(objective, task.Text):
            return objective.losses(batch, by_tokens=True)
        return objective.losses(batch)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Takes a step, keeps its report, and scores the model where it is time."""
        loss = super().training_step(*args, **kwargs)
        report = self.zo_optimizer.last_step
        assert report is not None
        self.reports.append(report)
        self._progress.update(self._bar, advance=1, note=f"loss {report.loss:.3f}")
        done, steps = len(self.reports), self._settings.steps
        if done == steps or done % (self._settings.eval_every or steps) == 0:
            self.score()
        return loss

    def score(self) -> None:
        """Scores the evaluation rows, where there are some, and keeps the score."""
        if self._evaluation:
            # Larger batches than those of steps: no perturbed losses are held beside them.
            size, step = 4 * self._settings.batch_size, len(self.reports)
            score = task.score(self._objective, self._evaluation, size)
            self.evaluations.append({"step": step, **score})
            words = ", ".join(f"{n} {value:.4f}" for n, value in score.items() if value is not None)
            self._progress.console.print(f"step {step}: evaluation {words}")


def _picture(losses: list[float], evaluations: list[dict[str, Any]]) -> Figure:
    """Draws loss, and accuracy where there is one, over the steps."""
    classified = evaluations and evaluations[0]["accuracy"] is not None
    names = ["loss", "accuracy"] if classified else ["loss"]
    figure = Figure(figsize=(1 + 4 * len(names), 3.6), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    panels[0].plot(range(1, len(losses) + 1), losses, color="#cccccc", label="batch")
    # Single batches are too noisy to see a trend in: a mean over a twentieth of the run shows it.
    width = max(1, len(losses) // 20)
    means = np.convolve(losses, np.full(width, 1 / width), mode="valid")
    panels[0].plot(range(width, len(losses) + 1), means, linewidth=2, label=f"mean of {width}")
    for axes, name in zip(panels, names, strict=True):
        steps, values = ([entry[key] for entry in evaluations] for key in ("step", name))
        axes.plot(steps, values, "o-", color="#d62728", label="evaluation")
        axes.set(xlabel="step", title=name.capitalize())
        axes.legend(frameon=False)
    return figure
