"""ZerothOrderSGD: stochastic gradient descent from losses alone."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zorba.optim.estimator import ESTIMATORS, Estimator, finite_differences
from zorba.optim.interrupt import deferred_interrupts
from zorba.optim.placement import PLACEMENTS, InplacePlacement, Placement, PlacementName
from zorba.optim.scratch import ScratchPlacement, active_table
from zorba.optim.terms import NoiseTerms
from zorba_kernels.noise import DISTRIBUTIONS, NOISE_VERSION, ROUNDINGS, Distribution, Rounding
from zorba_kernels.program import check_choice, check_uint64


@dataclass(frozen=True)
class StepReport:
    """What the last step did.

    Attributes:
        seed: uint64 of the step.
        scalars: g of each perturbation.
        loss: mean of the losses seen.
        skipped: whether a loss was not finite, so that the weights were left alone.
        seconds: of the whole step.
        kernel_seconds: of its passes over weights.
    """

    seed: int
    scalars: tuple[float, ...]
    loss: float
    skipped: bool
    seconds: float
    kernel_seconds: float


class ZerothOrderSGD(torch.optim.Optimizer):
    """SGD along seeded random directions: ``w <- w - lr * mean_p g[p] z_p`` (MeZO, 2305.17333).

    Needs the memory of inference: no gradient, no activation and no optimizer state is kept. The
    optimizer's state is its step number and its seed, so ``state_dict`` resumes exactly.

    Args:
        model: its parameters that require a gradient are fine-tuned; float32, bfloat16 or float16.
        lr: learning rate; schedulers of ``torch.optim.lr_scheduler`` work.
        eps: distance at which losses are taken.
        num_perturbations: P, directions a step.
        estimator: "central" (2P forwards) or "forward" (P + 1).
        distribution: "gaussian" or "rademacher" noise.
        placement: "scratch" leaves the weights' bits alone until the update, and costs a buffer of
            the largest module's parameters; "inplace" costs no memory, and restoring rounds.
        rounding: of updates to 16-bit weights, "stochastic" (unbiased) or "nearest" (loses updates
            below half a unit in the last place).
        weight_decay: decoupled, ``w <- w - lr * weight_decay * w`` in the same rounding.
        seed: uint64; the run is a function of it, the data and the initial weights.

    Raises:
        TypeError, ValueError: bad arguments, or nothing to train.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        eps: float = 1e-3,
        num_perturbations: int = 1,
        estimator: Estimator = "central",
        distribution: Distribution = "gaussian",
        placement: PlacementName = "scratch",
        rounding: Rounding = "stochastic",
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"the first argument is the model (an nn.Module), not {type(model).__name__}: "
                "perturbing needs its modules, not only its parameters"
            )
        _check_number("lr", lr, 0.0)
        _check_number("eps", eps, torch.finfo(torch.float32).tiny)
        _check_number("weight_decay", weight_decay, 0.0)
        if isinstance(num_perturbations, bool) or not isinstance(num_perturbations, int):
            raise TypeError(f"num_perturbations must be an integer, got {num_perturbations!r}")
        if num_perturbations < 1:
            raise ValueError(f"num_perturbations must be at least 1, got {num_perturbations}")
        check_choice("estimator", estimator, ESTIMATORS)
        check_choice("distribution", distribution, DISTRIBUTIONS)
        check_choice("placement", placement, PLACEMENTS)
        check_choice("rounding", rounding, ROUNDINGS)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("the model has no parameter with requires_grad=True")
        self._built = False
        defaults = {
            "lr": lr,
            "eps": eps,
            "num_perturbations": num_perturbations,
            "estimator": estimator,
            "rounding": rounding,
            "weight_decay": weight_decay,
            "distribution": distribution,
            "noise_version": NOISE_VERSION,
            "seed": check_uint64(seed, "seed"),
            "step": 0,
        }
        super().__init__(parameters, defaults)
        self._built = True
        self._model = model
        table = active_table(model)
        self.placement: Placement = (
            ScratchPlacement(model, table, distribution)
            if placement == "scratch"
            else InplacePlacement(table, distribution)
        )
        self.last_step: StepReport | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: the groups are the model's parameters."""
        if self._built:
            raise ValueError(
                "ZerothOrderSGD takes its parameters from the model: set requires_grad and make a "
                "new optimizer"
            )
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where another optimizer stopped.

        Raises:
            ValueError: it made other noise (distribution or version of the contract).
        """
        options = state_dict["param_groups"][0]
        for what in ("distribution", "noise_version"):
            mine = self.param_groups[0][what]
            if options.get(what) != mine:
                raise ValueError(
                    f"the state is of {what} {options.get(what)!r}, this optimizer of {mine!r}: "
                    "make the optimizer with the same one"
                )
        super().load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing: there are no gradients."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float | Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """Evaluates the closure 2P times (or P + 1) and updates the weights.

        Args:
            closure: runs the model on one batch and returns the loss, without calling backward.
                Every call must use the same batch. Randomness from torch's generators (dropout) is
                repeated for each call while the model is in training mode.

        Returns:
            Mean of the losses seen, a 0-dimensional float32 tensor.

        Raises:
            ValueError: no closure.
            Whatever the closure raises; the weights are then as they were before the step
            (placement "scratch": bit for bit).
        """
        if closure is None:
            raise ValueError("step needs a closure that returns the loss of one batch")
        started = time.perf_counter()
        kernel_before = self.placement.kernel_seconds
        options = self.param_groups[0]
        seed = step_seed(options["seed"], options["step"])
        with self.placement.session():
            scalars, loss = finite_differences(
                self._evaluator(closure),
                seed,
                options["eps"],
                options["num_perturbations"],
                options["estimator"],
                active=[1.0],
            )
            finite = all(map(math.isfinite, scalars))
            with deferred_interrupts():
                if finite:
                    self._update(seed, scalars, options)
                options["step"] += 1
        self.last_step = StepReport(
            seed,
            tuple(scalars),
            loss,
            not finite,
            time.perf_counter() - started,
            self.placement.kernel_seconds - kernel_before,
        )
        return torch.tensor(loss)

    def _evaluator(self, closure: Callable[[], float | Tensor]) -> Callable[[NoiseTerms], float]:
        generators = _GeneratorState(self.placement.table.device) if self._model.training else None

        def evaluate(terms: NoiseTerms) -> float:
            self.placement.move_to(terms)
            if generators is not None:
                generators.rewind()
            return float(closure())

        return evaluate

    def _update(self, seed: int, scalars: list[float], options: dict[str, Any]) -> None:
        lr = float(options["lr"])
        coefs = torch.tensor([[-lr * g / len(scalars) for g in scalars]], dtype=torch.float64)
        terms = NoiseTerms(
            (seed,) * len(scalars), tuple(range(len(scalars))), coefs.to(torch.float32)
        )
        decay = lr * options["weight_decay"]
        self.placement.update(
            terms,
            options["rounding"],
            rounding_seed=seed,
            decay=torch.tensor([decay]) if decay else None,
        )


class _GeneratorState:
    """Torch's random state when a step began, to be repeated for each evaluation."""

    def __init__(self, device: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._device = device if device.type == "cuda" else None
        self._cuda = torch.cuda.get_rng_state(device) if self._device else None

    def rewind(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._device is not None and self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


def step_seed(seed: int, step: int) -> int:
    """Returns the uint64 seed of a step: SHA-256 of (seed, step), first 8 bytes."""
    digest = hashlib.sha256(f"zorba step {seed} {step}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _check_number(what: str, value: float, least: float) -> None:
    if isinstance(value, Tensor):
        value = value.item()
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
        bound = "positive" if least > 0 else "at least 0"
        raise ValueError(f"{what} must be a finite number, {bound}, got {value!r}")
