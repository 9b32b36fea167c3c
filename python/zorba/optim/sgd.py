"""ZerothOrderSGD: stochastic gradient descent from losses alone."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from zorba.defaults import (
    DISTRIBUTION,
    EPS,
    ESTIMATOR,
    EXAMPLES_PER_DIRECTION,
    NUM_PERTURBATIONS,
    Directions,
    Distribution,
    Estimator,
)
from zorba.optim.evaluation import Evaluator
from zorba.optim.fused import FusedPlacement, fusable
from zorba.optim.options import Blocks, active_parameters, active_table, check_options, param_groups
from zorba.optim.own import OwnDirections, example_losses
from zorba.optim.owners import find_owners
from zorba.optim.placement import PLACEMENTS, InplacePlacement, Placement, PlacementName
from zorba.optim.scratch import ScratchPlacement
from zorba.optim.terms import (
    NoiseTerms,
    Step,
    differences,
    evaluation_noises,
    mean_loss,
    step_seed,
    velocity,
    window,
)
from zorba_kernels.noise import Rounding
from zorba_kernels.program import check_choice


@dataclass(frozen=True)
class StepReport:
    """The outcome of a step."""

    seed: int  # uint64
    scalars: tuple[float, ...]  # g of each perturbation, clipped; MeZO's projected gradient
    loss: float  # mean of the losses seen
    skipped: bool  # whether a loss was not finite, so that the weights were left alone
    seconds: float  # of the whole step
    kernel_seconds: float  # of its passes over weights


class Recorder(Protocol):
    """Gets every step, for example to write a trajectory."""

    def append(
        self, step: int, terms: NoiseTerms, rounding_seed: int, decay: Tensor | None
    ) -> None:
        """Takes the noise that a step added to the weights; see ``Placement.update``."""

    def skip(self, step: int) -> None:
        """Takes note of a step that left the weights alone."""


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
        distribution: "gaussian", "rademacher" or "rank1" noise; by default "gaussian", and "rank1"
            where the placement is "fused".
        directions: "shared", one direction for a whole batch, as in MeZO; or "own", one for each
            ``examples_per_direction`` examples: as many scalars more, for the same forwards. The
            closure then returns a loss for each example, a tensor [examples].
        examples_per_direction: of consecutive examples of a batch.
        normalize: divide the scalars of a step by their root mean square, so that ``lr`` is the
            length of a step along each direction whatever the loss.
        placement: "scratch" leaves the weights' bits alone until the update, and costs a buffer of
            the largest module's parameters; "fused" makes rank-one noise inside of linear layers
            and norms, which costs neither memory nor passes over weights, and lets each example
            have a direction of its own in one forward; parameters of other modules (embeddings,
            convolutions) are named in a warning and stay. "inplace" costs no memory, and restoring
            rounds. "scratch" and "inplace" run a forward for each direction of "own".
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
            the weights are then perturbed. They are restored by a forward of the model or of a
            module of it outside of a step, by ``state_dict`` of either, by ``eval()`` and
            ``flush()`` of the optimizer, and at its end. Call ``flush()`` before you read weights
            in another way.
        seed: uint64; the run is a function of it, the data and the initial weights.

    Attributes:
        placement: where perturbed weights live.
        last_step: a ``StepReport``, or None.
        recorder: gets every step, unless None; a ``zorba.log.TrajectoryWriter``, for example.

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
        distribution: Distribution | None = None,
        placement: PlacementName = "scratch",
        rounding: Rounding = "stochastic",
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        clip: float | None = None,
        blocks: Blocks = "all",
        groups: Sequence[Mapping[str, Any]] | None = None,
        prefix_reuse: bool = True,
        two_pass: bool = False,
        directions: Directions = "shared",
        examples_per_direction: int = EXAMPLES_PER_DIRECTION,
        normalize: bool = False,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"the first argument is the model (an nn.Module), not {type(model).__name__}: "
                "perturbing needs its modules, not only its parameters"
            )
        check_choice("placement", placement, PLACEMENTS)
        if two_pass and (placement, estimator, directions) != ("inplace", "central", "shared"):
            raise ValueError(
                "two_pass is for placement='inplace' with estimator='central' and shared "
                f"directions; got {placement!r}, {estimator!r} and {directions!r}"
            )
        if distribution is None:
            distribution = "rank1" if placement == "fused" else DISTRIBUTION
        options = check_options(
            lr=lr, eps=eps, num_perturbations=num_perturbations, estimator=estimator,
            distribution=distribution, rounding=rounding, weight_decay=weight_decay,
            momentum=momentum, clip=clip, directions=directions,
            examples_per_direction=examples_per_direction, normalize=normalize, seed=seed,
        )  # fmt: skip
        parameters = active_parameters(model, blocks)
        if placement == "fused":
            parameters = fusable(model, parameters)
        super().__init__(param_groups(parameters, groups or (), options), options)
        group_of = {id(p): g for g, group in enumerate(self.param_groups) for p in group["params"]}
        table = active_table(model, {name: group_of[id(p)] for name, p in parameters.items()})
        self.placement: Placement
        if placement == "scratch":
            self.placement = ScratchPlacement(model, table, distribution)
        elif placement == "fused":
            self.placement = FusedPlacement(model, table, distribution)
        else:
            self.placement = InplacePlacement(table, distribution, find_owners(model, table))
            if two_pass:
                # The weights are restored when the optimizer is collected, which the hooks, as they
                # know the placement alone, do not prevent. At exit nobody needs them any more.
                weakref.finalize(self, self.placement.guard(model)).atexit = False
        self._two_pass = two_pass
        read = float if directions == "shared" else example_losses
        self._evaluator = Evaluator(model, self.placement, prefix_reuse, read)
        self._own = OwnDirections(self.placement, self._evaluator.drew)
        self.last_step: StepReport | None = None
        self.recorder: Recorder | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: the groups are the model's parameters."""
        if hasattr(self, "placement"):
            raise ValueError(
                "ZerothOrderSGD takes its parameters from the model: set requires_grad, or give "
                "groups=, and make a new optimizer"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Returns options, step number and, with momentum, recent scalars; restores the weights."""
        self.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where another optimizer stopped; ValueError where that made other noise."""
        # Version 0.1.0 wrote none of these.
        earlier = {"directions": "shared", "normalize": False}
        earlier["examples_per_direction"] = self.defaults["examples_per_direction"]
        groups = [{**earlier, **group} for group in state_dict["param_groups"]]
        options = groups[0]
        for name in ("distribution", "noise_version", "directions", "examples_per_direction"):
            mine = self.param_groups[0][name]
            if options.get(name) != mine:
                raise ValueError(
                    f"the state is of {name} {options.get(name)!r}, this optimizer of {mine!r}: "
                    "make the optimizer with the same one"
                )
        # A perturbation that was left ahead is of this state's seed, not of the one that comes.
        self.flush()
        super().load_state_dict({**state_dict, "param_groups": groups})

    def flush(self) -> None:
        """Takes the next step's perturbation off the weights, where ``two_pass`` left one there."""
        self.placement.restore()

    eval = flush  # Trainer calls it before it evaluates and saves

    def train(self) -> None:
        """Does nothing; the counterpart of ``eval``."""

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[..., float | Tensor] | None = None, batch: Any = None
    ) -> Tensor:
        """Evaluates the closure 2P times (or P + 1) and updates the weights.

        Args:
            closure: runs the model on one batch and returns what to minimise, a loss or minus an
                accuracy, without calling backward; for own directions, of each example. Every call
                must use the same batch. Randomness from torch's generators (dropout) is repeated
                for each call while the model is in training mode. The first step may call it a few
                times more than that.
            batch: given to the closure, which then takes it as its argument. With own directions
                and placement "fused" both sides of a difference may run as one batch of twice as
                many rows; where memory runs out, the model draws random numbers (dropout), or
                blocks in front of the active ones are run once a step, they are two calls. A batch
                is tensors, mappings, lists and tuples of them, or has ``repeat(times)``.

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
        # Models move after construction: ``accelerator.prepare`` does, and ``model.to``.
        self.placement.refresh()
        kernel_before = self.placement.kernel_seconds
        options = self.param_groups[0]
        step, clip = options["step"], options["clip"]
        seed = step_seed(options["seed"], step)
        losses: list[Any]
        with self._evaluator.step(closure if batch is None else partial(closure, batch)) as at:
            if options["directions"] == "own":
                both = None if self._evaluator.reuses else batch
                losses, scalars = self._own(at, options, self._shares(), closure, both)
            else:
                losses = at(self._noises(step))
                scalars = differences(losses, options["eps"], options["estimator"])
            # One bad batch must not end a run, nor move the weights in a direction of no meaning.
            skipped = not all(map(math.isfinite, scalars))
            if clip is not None:
                scalars = [min(max(g, -clip), clip) for g in scalars]
            if options["normalize"] and not skipped:
                size = math.sqrt(math.fsum(g * g for g in scalars) / len(scalars))
                scalars = [g / size for g in scalars] if size > 0 else scalars
            # Ctrl-C waits until here: weights, step number and record change together.
            update = None if skipped else self._update(seed, scalars)
            options["step"] += 1
            if self.recorder is not None:
                if update is None:
                    self.recorder.skip(step)
                else:
                    self.recorder.append(step, *update)
        loss = mean_loss(losses)
        seconds = time.perf_counter() - started
        in_kernels = self.placement.kernel_seconds - kernel_before
        self.last_step = StepReport(seed, tuple(scalars), loss, skipped, seconds, in_kernels)
        return torch.tensor(loss)

    def rows_from(self, start: int) -> None:
        """Tells, in a closure of own directions, that the next forward begins with row ``start``.

        For a batch that is evaluated in parts: call it before each part, with the number of
        examples in front of it. The directions are then those of the batch as a whole.
        """
        # Other placements run all parts along one direction: they need not know.
        if isinstance(self.placement, FusedPlacement):
            self.placement.rows_from(start)

    def _noises(self, step: int) -> list[NoiseTerms]:
        """Where a step evaluates."""
        options = self.param_groups[0]
        seed, count = step_seed(options["seed"], step), options["num_perturbations"]
        return evaluation_noises(seed, options["eps"], count, options["estimator"], self._shares())

    def _shares(self) -> list[float]:
        """Distance of each group in units of the first one's."""
        return [group["eps"] / self.param_groups[0]["eps"] for group in self.param_groups]

    def _update(self, seed: int, scalars: list[float]) -> tuple[NoiseTerms, int, Tensor | None]:
        """Writes the weights; returns what was written, as a recorder takes it."""
        options, groups = self.param_groups[0], self.param_groups
        momentum = options["momentum"]
        steps: list[Step] = [(seed, tuple(scalars), momentum)]
        # torch keeps its state by parameters, and saves entries with other keys as they are.
        state = cast(dict[str, Any], self.state)
        if momentum:
            # A few bytes a step stand for a buffer as large as the model.
            steps = [*state["momentum"].get("steps", []), *steps][-window(momentum) :]
        rates = [float(group["lr"]) for group in groups]
        # A scalar is a difference over the first group's eps; a group's own is that over its share.
        terms = velocity(steps, [-lr / s for lr, s in zip(rates, self._shares(), strict=True)])
        decays = [lr * group["weight_decay"] for lr, group in zip(rates, groups, strict=True)]
        decay = torch.tensor(decays) if any(decays) else None
        # Its seed is known by now, so the pass that updates can also perturb for the next step.
        then = self._noises(options["step"] + 1)[0] if self._two_pass else None
        self.placement.update(terms, options["rounding"], seed, decay, then)
        if momentum:
            state["momentum"] = {"steps": steps}
        return terms, seed, decay
