"""ZerothOrderSGD: stochastic gradient descent from losses alone."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from zorba.optim.defaults import (
    DISTRIBUTION,
    EPS,
    ESTIMATOR,
    ESTIMATORS,
    NUM_PERTURBATIONS,
    Estimator,
)
from zorba.optim.estimator import finite_differences
from zorba.optim.evaluation import Evaluator
from zorba.optim.guard import guard
from zorba.optim.interrupt import deferred_interrupts
from zorba.optim.momentum import Step, velocity, window
from zorba.optim.placement import PLACEMENTS, InplacePlacement, Placement, PlacementName
from zorba.optim.scratch import ScratchPlacement
from zorba.optim.select import Blocks, active_parameters, active_table, param_groups
from zorba.optim.terms import NoiseTerms, step_seed
from zorba_kernels.noise import DISTRIBUTIONS, NOISE_VERSION, ROUNDINGS, Distribution, Rounding
from zorba_kernels.program import check_choice, check_uint64


@dataclass(frozen=True)
class StepReport:
    """What the last step did.

    Attributes:
        seed: uint64 of the step.
        scalars: g of each perturbation, clipped.
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


class Recorder(Protocol):
    """Is told every step, for example to write a trajectory."""

    def append(
        self, step: int, terms: NoiseTerms, rounding_seed: int, decay: Tensor | None
    ) -> None:
        """Takes what was added to the weights in a step; see ``Placement.update``."""

    def skip(self, step: int) -> None:
        """Is told of a step that left the weights alone."""


class ZerothOrderSGD(torch.optim.Optimizer):
    """SGD along seeded random directions: ``w <- w - lr * mean_p g[p] z_p`` (MeZO, 2305.17333).

    Needs the memory of inference: no gradient, no activation and no optimizer state of the size of
    the weights is kept. Its state is a step number, a seed, and with momentum the scalars of recent
    steps, so ``state_dict`` is small and resumes exactly. The loss need not be differentiable.

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
        momentum: of heavy-ball SGD, below 1. The velocity is replayed from seeds: a step adds
            about ``log(0.01) / log(momentum)`` noises in its pass, and memory stays as it is.
        clip: largest absolute value of a scalar, or None.
        blocks: "all"; "last:4" for the last 4 transformer blocks alone; or a mask, one boolean a
            block. Blocks in front of the first active one run once a step (``prefix_reuse``).
        groups: parameters with options of their own: dicts of "params" (names or parameters) and
            any of lr, eps and weight_decay. With ``eps`` of its own a group is perturbed by it, and
            its update uses the difference over it.
        prefix_reuse: whether to keep the output of blocks that no perturbation can reach.
        two_pass: for placement "inplace" and "central": the update also perturbs for the next
            step, so that a step costs two passes over the weights instead of three. Between steps
            the weights are then perturbed; a forward of the model or of a module of it outside of
            a step, ``state_dict`` of either, ``eval()`` and ``flush()`` of the optimizer, and its
            end settle that. Call ``flush()`` before you read weights in another way.
        seed: uint64; the run is a function of it, the data and the initial weights.

    Attributes:
        placement: where perturbed weights live.
        last_step: a ``StepReport``, or None.
        recorder: is told every step, unless None; a ``zorba.log.TrajectoryWriter``, say.

    Raises:
        TypeError, ValueError: bad arguments, or nothing to train.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        eps: float = EPS,
        num_perturbations: int = NUM_PERTURBATIONS,
        estimator: Estimator = ESTIMATOR,
        distribution: Distribution = DISTRIBUTION,
        placement: PlacementName = "scratch",
        rounding: Rounding = "stochastic",
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        clip: float | None = None,
        blocks: Blocks = "all",
        groups: Sequence[Mapping[str, Any]] | None = None,
        prefix_reuse: bool = True,
        two_pass: bool = False,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"the first argument is the model (an nn.Module), not {type(model).__name__}: "
                "perturbing needs its modules, not only its parameters"
            )
        _check_count("num_perturbations", num_perturbations)
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must be at least 0 and below 1, got {momentum!r}")
        if clip is not None:
            _check_number("clip", clip, torch.finfo(torch.float32).tiny)
        check_choice("estimator", estimator, ESTIMATORS)
        check_choice("distribution", distribution, DISTRIBUTIONS)
        check_choice("placement", placement, PLACEMENTS)
        check_choice("rounding", rounding, ROUNDINGS)
        if two_pass and (placement, estimator) != ("inplace", "central"):
            raise ValueError(
                "two_pass is for placement='inplace' with estimator='central'; got "
                f"{placement!r} and {estimator!r}"
            )
        parameters = active_parameters(model, blocks)
        self._built = False
        defaults = {
            "lr": lr,
            "eps": eps,
            "num_perturbations": num_perturbations,
            "estimator": estimator,
            "rounding": rounding,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "clip": clip,
            "distribution": distribution,
            "noise_version": NOISE_VERSION,
            "seed": check_uint64(seed, "seed"),
            "step": 0,
        }
        super().__init__(param_groups(parameters, groups), defaults)
        self._built = True
        for group in self.param_groups:
            _check_number("lr", group["lr"], 0.0)
            _check_number("eps", group["eps"], torch.finfo(torch.float32).tiny)
            _check_number("weight_decay", group["weight_decay"], 0.0)
        self._model = model
        names = {id(p): name for name, p in parameters.items()}
        table = active_table(
            model,
            {names[id(p)]: g for g, group in enumerate(self.param_groups) for p in group["params"]},
        )
        self.placement: Placement = (
            ScratchPlacement(model, table, distribution)
            if placement == "scratch"
            else InplacePlacement(table, distribution)
        )
        group_of = {entry.name: entry.group for entry in table.entries}
        self.placement.remake = lambda: active_table(model, group_of)
        self._evaluator = Evaluator(model, self.placement, prefix_reuse)
        self._two_pass = two_pass
        if two_pass:
            unguard = guard(model, self.placement)
            weakref.finalize(self, unguard).atexit = False
        self.last_step: StepReport | None = None
        self.recorder: Recorder | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: the groups are the model's parameters."""
        if self._built:
            raise ValueError(
                "ZerothOrderSGD takes its parameters from the model: set requires_grad, or give "
                "groups=, and make a new optimizer"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Returns options, step number and, with momentum, recent scalars; settles the weights."""
        self.flush()
        return super().state_dict()

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
        self.flush()
        super().load_state_dict(state_dict)

    def flush(self) -> None:
        """Takes the next step's perturbation off the weights, where ``two_pass`` left one there."""
        self.placement.settle()

    def train(self) -> None:
        """Does nothing; the counterpart of ``eval``."""

    def eval(self) -> None:
        """Makes the weights fit for evaluation and saving, as ``flush``."""
        self.flush()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing: there are no gradients."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float | Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """Evaluates the closure 2P times (or P + 1) and updates the weights.

        Args:
            closure: runs the model on one batch and returns what to minimise, a loss or minus an
                accuracy, without calling backward. Every call must use the same batch. Randomness
                from torch's generators (dropout) is repeated for each call while the model is in
                training mode. The first step may call it a few times more than that.

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
        self.placement.refresh()
        kernel_before = self.placement.kernel_seconds
        options = self.param_groups[0]
        seed = step_seed(options["seed"], options["step"])
        # Ctrl-C is for the closure: elsewhere it waits, at most until the step is done.
        with deferred_interrupts() as gate, self._evaluator.session():
            scalars, loss = finite_differences(
                self._evaluator.of(closure, gate),
                seed,
                options["eps"],
                options["num_perturbations"],
                options["estimator"],
                active=self._shares(),
            )
            finite = all(map(math.isfinite, scalars))
            if options["clip"] is not None:
                scalars = [min(max(g, -options["clip"]), options["clip"]) for g in scalars]
            update = self._update(seed, scalars) if finite else None
            options["step"] += 1
            if self.recorder is not None and update is not None:
                self.recorder.append(options["step"] - 1, *update)
            elif self.recorder is not None:
                self.recorder.skip(options["step"] - 1)
        self.last_step = StepReport(
            seed,
            tuple(scalars),
            loss,
            not finite,
            time.perf_counter() - started,
            self.placement.kernel_seconds - kernel_before,
        )
        return torch.tensor(loss)

    def _shares(self) -> list[float]:
        """Distance of each group in units of the first one's."""
        return [group["eps"] / self.param_groups[0]["eps"] for group in self.param_groups]

    def _update(self, seed: int, scalars: list[float]) -> tuple[NoiseTerms, int, Tensor | None]:
        """Writes the weights; returns what was written, as a recorder takes it."""
        options = self.param_groups[0]
        steps: list[Step] = [(seed, tuple(scalars), options["momentum"])]
        if options["momentum"]:
            steps = [*self._recent(), *steps][-window(options["momentum"]) :]
        rates = [float(group["lr"]) for group in self.param_groups]
        scale = [-lr / share for lr, share in zip(rates, self._shares(), strict=True)]
        terms = velocity(steps, scale)
        decays = [
            lr * group["weight_decay"] for lr, group in zip(rates, self.param_groups, strict=True)
        ]
        decay = torch.tensor(decays) if any(decays) else None
        self.placement.update(terms, options["rounding"], seed, decay, self._next_move())
        if options["momentum"]:
            cast(dict[str, Any], self.state)["momentum"] = {"steps": steps}
        return terms, seed, decay

    def _recent(self) -> list[Step]:
        """Steps that the velocity is made of."""
        return list(cast(dict[str, Any], self.state)["momentum"].get("steps", []))

    def _next_move(self) -> NoiseTerms | None:
        """What the next step's first evaluation will add to the weights."""
        if not self._two_pass:
            return None
        options = self.param_groups[0]
        seed = step_seed(options["seed"], options["step"] + 1)
        shares = torch.tensor(self._shares(), dtype=torch.float32)
        return NoiseTerms.single(seed, 0, options["eps"] * shares)


def _check_number(what: str, value: float, least: float) -> None:
    if isinstance(value, Tensor):
        value = value.item()
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
        bound = "positive" if least > 0 else "at least 0"
        raise ValueError(f"{what} must be a finite number, {bound}, got {value!r}")


def _check_count(what: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{what} must be at least 1, got {value}")
