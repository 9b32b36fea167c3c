"""ZOTrainer: ``transformers.Trainer`` with zeroth-order steps in place of backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from zorba.defaults import EPS, ESTIMATOR, EXAMPLES_PER_DIRECTION, NUM_PERTURBATIONS
from zorba.hf.losses import ExampleLosses, MicroBatches
from zorba.log import TrajectoryWriter
from zorba.optim import ZerothOrderSGD, active_parameters, active_table
from zorba.optim.fused import unfusable


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ZOArguments(TrainingArguments):
    """``TrainingArguments`` and the options of ``ZerothOrderSGD`` (see there).

    ``learning_rate``, ``weight_decay``, ``seed`` and the scheduler are those of the base class.
    """

    zo_eps: float = _option(EPS, "Distance at which losses are taken.")
    zo_perturbations: int = _option(NUM_PERTURBATIONS, "P: directions a step.")
    zo_estimator: str = _option(ESTIMATOR, "central or forward.")
    zo_distribution: str | None = _option(
        None, "gaussian, rademacher or rank1; by default gaussian, or rank1 for placement fused."
    )
    zo_directions: str = _option("shared", "own: a direction for each few examples of a batch.")
    zo_examples_per_direction: int = _option(EXAMPLES_PER_DIRECTION, "Of own directions.")
    zo_normalize: bool = _option(False, "Divide a step's scalars by their root mean square.")
    zo_placement: str = _option(
        "scratch", "scratch, inplace, or fused: noise inside of linear layers and norms."
    )
    zo_rounding: str = _option("stochastic", "Of updates to 16-bit weights, or nearest.")
    zo_momentum: float = _option(0.0, "Replayed from seeds.")
    zo_clip: float | None = _option(None, "Largest size of a scalar.")
    zo_blocks: str = _option("all", "all, or last:N transformer blocks.")
    zo_prefix_reuse: bool = _option(True, "Run blocks that no perturbation can reach once a step.")
    zo_two_pass: bool = _option(False, "In place: two passes over the weights a step, not three.")
    zo_trajectory: str | None = _option(None, "File that records the run; see zorba.log.")


class ZOTrainer(Trainer):
    """A ``Trainer`` whose training step needs no gradient (MeZO, arXiv 2305.17333).

    A script for ``Trainer`` runs with it once the class and the arguments are exchanged::

        args = ZOArguments("out", learning_rate=1e-6, zo_eps=1e-3, ...)
        ZOTrainer(model=model, args=args, train_dataset=data).train()

    Data, collators, evaluation, callbacks, schedulers, checkpoints and resuming are the base
    class's. What differs:

    - Gradient accumulation makes one larger batch: a step evaluates all of its micro-batches for
      each perturbation, and holds their inputs meanwhile.
    - With ``zo_directions="own"`` the loss of each example counts. It is taken from the model's
      output, and proven at the first step: the mean must be the loss that ``Trainer`` computes. A
      ``compute_loss_func`` (or ``compute_loss``) that returns a tensor [examples] is taken as it
      is, and with shared directions its mean.
    - With several processes each evaluates its own share of the data; losses are averaged, so that
      only scalars travel, and all replicas take the same step. Directions must be shared.
    - Logs have ``zo_scalar`` and ``zo_skipped_steps`` (steps whose loss was not finite) in place of
      ``grad_norm``.
    - ``zo_trajectory`` records the run in a file of some kilobytes, from which ``zorba replay``
      rebuilds the model; a resumed run goes on with it.
    - Mixed precision is that of the forward alone; no loss is scaled. Weights keep the dtype that
      the model was loaded in, and bfloat16 and float16 train well (stochastic rounding).

    Arguments are those of ``Trainer``; ``args`` may be plain ``TrainingArguments`` for the default
    options, and ``optimizers`` may hold a scheduler.

    Raises:
        ValueError: an optimizer is given, a trajectory with placement "inplace", own directions in
            several processes, or DeepSpeed, FSDP or several GPUs in one process. ``train`` raises
            it for own directions where losses of examples are not known.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            raise ValueError(
                "ZOTrainer makes its own optimizer: give its options as ZOArguments(zo_eps=..., "
                "learning_rate=...)"
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "ZOTrainer holds a whole model in each process: DeepSpeed and FSDP, which shard "
                "it, are not supported"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"ZOTrainer uses one GPU a process and sees {self.args.n_gpu}: start one process "
                "a GPU (torchrun), or set CUDA_VISIBLE_DEVICES"
            )
        # Plain TrainingArguments have none of the options: then each is the default.
        added = [f for f in fields(ZOArguments) if f.name.startswith("zo_")]
        options: dict[str, Any] = {
            f.name.removeprefix("zo_"): getattr(self.args, f.name, f.default) for f in added
        }
        self._trajectory: str | None = options.pop("trajectory")
        if self._trajectory and options["placement"] == "inplace":
            raise ValueError(
                "zo_trajectory needs zo_placement='scratch' or 'fused': restoring in place rounds, "
                "which no record tells"
            )
        if options["directions"] == "own" and self.args.world_size > 1:
            raise ValueError(
                "zo_directions='own' runs in one process: several would give other examples the "
                "same directions. Set zo_directions='shared', whose losses are averaged"
            )
        options["num_perturbations"] = options.pop("perturbations")
        self._options = options  # of ZerothOrderSGD, by its names
        # It scales gradients, and would skip steps whose gradients it has not seen.
        self.accelerator.scaler = None
        smoothing = 0.0 if self.label_smoother is None else self.args.label_smoothing_factor
        self._example_losses = ExampleLosses(self.accelerator.unwrap_model(self.model), smoothing)
        self._micro_batches: list[dict[str, Any]] = []
        self._skipped_steps = 0
        self._writer: TrajectoryWriter | None = None

    @property
    def zo_optimizer(self) -> ZerothOrderSGD:
        """The optimizer without what accelerate puts around it."""
        wrapped: Any = self.optimizer
        return cast(ZerothOrderSGD, getattr(wrapped, "optimizer", wrapped))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the optimizer from the arguments; weight decay spares norms and biases."""
        if self.optimizer is None:
            target: Any = self.model if model is None else model
            groups = None
            if self.args.weight_decay:
                decaying = set(self.get_decay_parameter_names(target))
                names = {id(p): name for name, p in target.named_parameters()}
                active = active_parameters(target, self._options["blocks"])
                if self._options["placement"] == "fused":
                    # The optimizer leaves these out, and refuses groups that name them.
                    left = unfusable(target, active_table(target, dict.fromkeys(active, 0)))
                    active = {name: p for name, p in active.items() if name not in left}
                spared = [p for p in active.values() if names[id(p)] not in decaying]
                groups = [{"params": spared, "weight_decay": 0.0}] if spared else None
            options: dict[str, Any] = {
                "lr": self.args.learning_rate,
                "seed": self.args.seed,
                **self._options,
            }
            options |= {"weight_decay": self.args.weight_decay, "groups": groups}
            self.optimizer = _SteppedByTrainer(target, **options)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Collects a micro-batch, and takes a step on those of a batch at the last one.

        Returns the mean loss of the batch at its last micro-batch, 0 at the others: float32 [].
        """
        self._micro_batches.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        # Forgotten before the step: if it fails, its batches must not be part of the next one.
        batches, self._micro_batches = self._micro_batches, []
        # Here, not in train(): a checkpoint has been loaded by now, and tells the step.
        self._start_recording()
        model.train()

        if self._options["directions"] == "own":
            closure = partial(self._own_losses, model, num_items_in_batch)
            loss = self.zo_optimizer.step(closure, MicroBatches(tuple(batches)))
        else:
            loss = self.zo_optimizer.step(
                partial(self._shared_loss, model, num_items_in_batch, batches)
            )
        report = self.zo_optimizer.last_step
        self._skipped_steps += int(report is not None and report.skipped)
        return loss.to(self.args.device)

    def _shared_loss(self, model: nn.Module, items: Any, batches: list[dict[str, Any]]) -> float:
        """The loss of a batch."""
        losses = []
        for batch in batches:
            with self.compute_loss_context_manager():
                loss: Any = self.compute_loss(model, dict(batch), num_items_in_batch=items)
            divisor = self._divisor(items, len(batches))
            if loss.ndim == 1:  # losses of examples, as own directions take them
                loss, divisor = loss.mean(), len(batches)
            losses.append((loss / divisor).detach().float())
        # Reduced here: every process sees the same losses, and so takes the same step.
        return float(self.accelerator.reduce(torch.stack(losses).sum(), reduction="mean"))

    def _own_losses(self, model: nn.Module, items: Any, batch: MicroBatches) -> Tensor:
        """The loss of each example of a batch, [examples]; their mean is the batch's loss."""
        found: list[Tensor] = []
        scales: list[float] = []  # of each micro-batch's mean
        if items is not None:
            items = items * batch.times
        for inputs in batch.parts:
            self.zo_optimizer.rows_from(sum(map(len, found)))
            with self.compute_loss_context_manager():
                both: Any = self.compute_loss(
                    model, dict(inputs), return_outputs=True, num_items_in_batch=items
                )
            loss, outputs = both if isinstance(both, tuple) else (both, None)
            if loss.ndim == 1:
                # Losses of examples by whoever wrote the function: nothing is known better here.
                found.append(loss.detach())
                scales.append(0.0)
            else:
                found.append(self._example_losses(outputs, inputs, loss.detach(), items))
                scales.append(1 / self._divisor(items, len(batch.parts)))
        # Those of a micro-batch have its loss as their mean, which is a share of the batch's.
        total = sum(map(len, found))
        scaled = [
            losses * (scale * total / len(losses)) if scale else losses
            for losses, scale in zip(found, scales, strict=True)
        ]
        return torch.cat(scaled)

    def _divisor(self, items: Any, count: int) -> int:
        """By what the loss of one of ``count`` micro-batches is divided, before they are added."""
        # A loss that is divided by the batch's items sums up over micro-batches; a mean of its
        # micro-batch is to be divided by their number. transformers decides in the same way, by a
        # switch of the trainer or else by the model's signature.
        shared = getattr(self, "loss_is_scaled_for_ga", None)
        if shared is None:
            by_items = self.model_accepts_loss_kwargs and items is not None
            shared = by_items or self.compute_loss_func is not None
        return 1 if shared else count

    # There is no gradient to clip, nor a scale to take off it.
    def _clip_grad_norm(self, model: nn.Module) -> float:
        return 0.0

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        return 0.0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs the scalar and the skipped steps in place of the norm of a gradient."""
        if logs.pop("grad_norm", None) is not None:
            if (report := self.zo_optimizer.last_step) is not None:
                logs["zo_scalar"] = report.scalars[-1]
            logs["zo_skipped_steps"] = self._skipped_steps
        super().log(logs, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as ``Trainer.train``; the weights are restored when it ends, however it ends."""
        try:
            result = super().train(*args, **kwargs)
            if self._writer is not None:
                self._writer.finish()
            return result
        finally:
            # Closed without an end where training failed: a resumed run goes on with the file.
            if self._writer is not None:
                self._writer.close()
                self._writer = self.zo_optimizer.recorder = None
            if self.optimizer is not None:
                self.zo_optimizer.flush()

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Entered again after running out of memory it has no batch.
        self._micro_batches.clear()
        return super()._inner_training_loop(*args, **kwargs)

    def _start_recording(self) -> None:
        path, optimizer = self._trajectory, self.zo_optimizer
        if not path or self._writer is not None or not self.is_world_process_zero():
            return
        options, table = optimizer.param_groups[0], optimizer.placement.table
        # A run that goes on cuts the records of the steps that it will take again.
        if options["step"]:
            self._writer = TrajectoryWriter.resume(path, table, options["step"])
        else:
            named = (options[name] for name in ("seed", "distribution", "rounding"))
            settings = {k: str(v) for k, v in self.args.to_sanitized_dict().items()}
            self._writer = TrajectoryWriter.create(
                path, table, *named, model=self.model, settings=settings
            )
        optimizer.recorder = self._writer

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # The record first: a run that resumes from a checkpoint needs it up to there.
        if self._writer is not None:
            self._writer.sync()
        super()._save_checkpoint(*args, **kwargs)


class _SteppedByTrainer(ZerothOrderSGD):
    """Trainer's loop calls ``step`` behind ``training_step``, which has taken the step already."""

    # A class of its own: without a closure the optimizer raises, which others should find out.
    def step(  # type: ignore[override]
        self, closure: Callable[..., float | Tensor] | None = None, batch: Any = None
    ) -> Tensor:
        return torch.zeros(()) if closure is None else super().step(closure, batch)
