"""FinetuneTrainer: ZOTrainer on rows of files, with a loss and a score that read them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from rich.progress import Progress
from torch import Tensor, nn
from transformers import PrinterCallback

from zorba.apps.finetune.data import Row
from zorba.apps.finetune.objective import Objective
from zorba.apps.finetune.settings import FinetuneSettings
from zorba.hf.trainer import ZOArguments, ZOTrainer
from zorba.optim import StepReport


class FinetuneTrainer(ZOTrainer):
    """Trains by an objective, which makes batches of rows on the model's device.

    Args:
        model: where it computes; idle blocks may be elsewhere.
        objective: on that model.
        settings: of the fine-tune.
        rows: to train on.
        evaluation: rows to score before the first step, in between and at the end; may be none.
        progress: shows the steps.

    Attributes:
        reports: of the steps.
        evaluations: step, loss and accuracy of each evaluation.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        settings: FinetuneSettings,
        rows: list[Row],
        evaluation: list[Row],
        progress: Progress,
    ) -> None:
        self.reports: list[StepReport] = []
        self.evaluations: list[dict[str, Any]] = []
        self._objective = objective
        self._evaluation = evaluation
        self._progress = progress
        self._bar = progress.add_task("fine-tune", total=settings.steps, note="")
        arguments = _arguments(settings, len(rows), bool(evaluation))
        super().__init__(model, arguments, self._collate, rows, evaluation)
        self.remove_callback(PrinterCallback)
        # Offloaded blocks must stay on the host, and batches are already in place.
        self.accelerator.device_placement = False

    def _collate(self, rows: list[Row]) -> dict[str, Any]:
        return {"batch": self._objective.encode(rows)}

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Returns 0: the estimate would need inputs under the model's names, and is not shown."""
        return 0

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """Returns the objective's loss of a batch: float32 []."""
        # No dropout, as in MeZO: it would add noise to differences of losses.
        model.eval()
        return self._objective.loss(inputs["batch"])

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Takes a step, keeps its report and moves the bar."""
        loss = super().training_step(*args, **kwargs)
        report = self.zo_optimizer.last_step
        assert report is not None
        self.reports.append(report)
        self._progress.update(self._bar, advance=1, note=f"loss {report.loss:.3f}")
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Scores the evaluation rows, and keeps the score."""
        assert self.model is not None
        self.control.should_evaluate = False  # or the end of an epoch would evaluate again
        self.model.eval()
        size = 4 * self.args.per_device_train_batch_size  # no perturbed losses beside it
        score, step = self._objective.score(self._evaluation, size), self.state.global_step
        self.evaluations.append({"step": step, **score._asdict()})
        accuracy = "" if score.accuracy is None else f", accuracy {score.accuracy:.3f}"
        self._progress.console.print(f"step {step}: evaluation loss {score.loss:.4f}{accuracy}")
        return {"eval_loss": score.loss}


def _arguments(settings: FinetuneSettings, rows: int, evaluate: bool) -> ZOArguments:
    """Returns the trainer's arguments: it writes nothing but the trajectory, and prints nothing."""
    # An option of a step has the name of a setting behind its prefix.
    knobs = {field.name: field.name.removeprefix("zo_") for field in fields(ZOArguments)}
    options = {
        name: getattr(settings, knob)
        for name, knob in knobs.items()
        if name != knob and hasattr(settings, knob)
    }
    arguments = ZOArguments(
        output_dir=str(settings.out),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        dataloader_drop_last=rows >= settings.batch_size,
        dataloader_pin_memory=False,
        remove_unused_columns=False,  # the fields of rows are the template's, not the model's
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=settings.eval_every or settings.steps,
        eval_on_start=evaluate,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=settings.device == "cpu",
        zo_trajectory=None if settings.save == "model" else str(settings.out / "trajectory.zot"),
        **options,
    )
    # One device is used, whatever the machine has: ZOTrainer refuses several in one process.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
