"""Runs a fine-tune from files to files: model, trajectory, metrics.json and loss.png."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
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
    if labels:
        said = ", ".join(f"{a} = {b!r}" for a, b in zip(labels, settings.words, strict=True))
        console.print(f"labels: {said}")
    model, tokenizer = task.load_model(settings)
    active = active_parameters(model, settings.blocks)
    offload: Any = nullcontext()
    if settings.offload is not None:
        busy = [block.name for block in find_blocks(model) if active.keys() & block.parameters]
        offload = Offload(model, busy, task.device_of(settings), settings.offload)
    reports: list[StepReport] = []
    evaluations: list[dict[str, Any]] = []
    with offload, command.progress_bar(console) as progress:
        # The objective is checked before the trainer makes the folder.
        objective = task.make_objective(settings, model, tokenizer)
        every, trained = (sum(map(Tensor.numel, p)) for p in (model.parameters(), active.values()))
        first = next(iter(active.values()))
        console.print(
            f"model: {settings.model}, {every / 1e6:.1f} M parameters, {trained / 1e6:.1f} M "
            f"active, {first.dtype} on {first.device}"
        )
        bar = progress.add_task("fine-tune", total=settings.steps, note="")

        def evaluate() -> None:
            # Larger batches than those of steps: no perturbed losses are held beside them.
            score = task.score(objective, evaluation, 4 * settings.batch_size)
            evaluations.append({"step": len(reports), **score})
            words = ", ".join(f"{n} {value:.4f}" for n, value in score.items() if value is not None)
            console.print(f"step {len(reports)}: evaluation {words}")

        def on_step(report: StepReport) -> None:
            reports.append(report)
            progress.update(bar, advance=1, note=f"loss {report.loss:.3f}")
            done, stride = len(reports), settings.eval_every or settings.steps
            if evaluation and (done % stride == 0 or done == settings.steps):
                evaluate()

        machine.reset_peak_memory()
        trainer = FinetuneTrainer(model, objective, settings, rows, on_step)
        if evaluation:
            evaluate()
        trainer.train()
        if settings.save != "trajectory":
            model.save_pretrained(out["model"])
            tokenizer.save_pretrained(out["model"])
    metrics: dict[str, Any] = {
        "settings": asdict(settings),
        "machine": machine.describe(),
        "steps": settings.steps,
        "step_seconds": sum(report.seconds for report in reports) / len(reports),
        "kernel_seconds": sum(report.kernel_seconds for report in reports) / len(reports),
        "peak_memory_bytes": machine.peak_memory(),
        "skipped": sum(report.skipped for report in reports),
        "losses": [report.loss for report in reports],
        "evaluations": evaluations,
    }
    if settings.save != "model":
        metrics["trajectory_bytes"] = out["trajectory.zot"].stat().st_size
        console.print(f"trajectory: {metrics['trajectory_bytes']:,} bytes")
    console.print(
        f"steps: {1e3 * metrics['step_seconds']:.0f} ms each, "
        f"{1e3 * metrics['kernel_seconds']:.1f} ms of it passes over weights; "
        f"{metrics['skipped']} were skipped, as their loss was not finite\n"
        f"peak memory: {metrics['peak_memory_bytes'] / 2**20:,.0f} MiB of the process"
    )
    out["metrics.json"].write_text(json.dumps(metrics, indent=2, default=str) + "\n")
    out["loss.png"] = settings.out / "loss.png"
    _picture(metrics["losses"], evaluations).savefig(out["loss.png"], dpi=120)
    console.print("wrote " + ", ".join(str(path) for path in out.values() if path.exists()))
    return metrics


class FinetuneTrainer(ZOTrainer):
    """Trains by an objective, which makes batches on the model's device, and hands out reports."""

    def __init__(
        self,
        model: nn.Module,
        objective: task.Objective,
        settings: FinetuneSettings,
        rows: list[task.Row],
        on_step: Callable[[StepReport], None],
    ) -> None:
        self._objective = objective
        self._on_step = on_step
        # An option of a step has the name of a setting behind its prefix.
        options = {f"zo_{name}": value for name, value in vars(settings).items()}
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
            **{name: value for name, value in options.items() if hasattr(ZOArguments, name)},
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
        """Returns the objective's loss of a batch: float32 []."""
        # No dropout, as in MeZO: it would add noise to differences of losses.
        model.eval()
        return self._objective(inputs["batch"])

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Takes a step and tells of it."""
        loss = super().training_step(*args, **kwargs)
        assert self.zo_optimizer.last_step is not None
        self._on_step(self.zo_optimizer.last_step)
        return loss


def _picture(losses: list[float], evaluations: list[dict[str, Any]]) -> Figure:
    """Draws loss, and accuracy where there is one, over the steps."""
    names = ["loss", *(n for n in ("accuracy",) if evaluations and evaluations[0][n] is not None)]
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
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure
