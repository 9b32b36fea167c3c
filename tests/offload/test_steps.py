"""A model whose idle blocks are on the host takes the steps of a resident one, bit for bit."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zorba import ZerothOrderSGD
from zorba.hf import narrow_logits
from zorba.offload import Offload

from tests.hf.steps import bits_of, state_of
from tests.hf.tiny import CASES, Case, build, case_of, loss_of

OPTIONS = {"lr": 1e-2, "eps": 1e-2, "seed": 3}


def run(model: nn.Module, case: Case, steps: int, **options: Any) -> list[tuple[float, ...]]:
    """The scalars of some steps."""
    optimizer = ZerothOrderSGD(model, **(OPTIONS | options))
    scalars = []
    for step in range(steps):
        torch.manual_seed(step)  # of dropout
        optimizer.step(lambda: loss_of(model, case))
        assert optimizer.last_step is not None
        scalars.append(optimizer.last_step.scalars)
    return scalars


def assert_equal_models(a: nn.Module, b: nn.Module) -> None:
    """Every bit of every parameter and buffer."""
    mine, theirs = state_of(a), state_of(b)
    assert mine.keys() == theirs.keys()
    different = [n for n in mine if not torch.equal(bits_of(mine[n]), bits_of(theirs[n]))]
    assert not different


def mask_of(case: Case, rng: Any) -> list[bool]:
    """At least one active and one idle block."""
    count = len(case.names)
    while True:
        mask = [bool(rng.integer(1)) for _ in range(count)]
        if 0 < sum(mask) < count:
            return mask


# With one block none can be idle.
STACKS = [case for case in CASES if len(case.names) > 1]


@pytest.mark.parametrize("case", STACKS, ids=lambda case: f"{case.kind}-{case.auto}")
def test_every_architecture_steps_as_if_it_were_resident(
    case: Case, tmp_path: Path, rng: Any
) -> None:
    mask = mask_of(case, rng)
    resident, offloaded = build(case), build(case)
    assert_equal_models(resident, offloaded)
    active = [name for name, on in zip(case.names, mask, strict=True) if on]
    with Offload(offloaded, active, folder=tmp_path):
        options = {"blocks": mask, "num_perturbations": 2}
        assert run(offloaded, case, 2, **options) == run(resident, case, 2, **options)
    assert_equal_models(resident, offloaded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["central", "forward"])
@pytest.mark.parametrize("prefix_reuse", [True, False])
def test_each_idle_block_is_brought_once_a_step(
    dtype: torch.dtype, estimator: str, prefix_reuse: bool, tmp_path: Path
) -> None:
    case = case_of("llama")
    resident, offloaded = build(case, dtype), build(case, dtype)
    options = {
        "blocks": [False, True, False],
        "num_perturbations": 3,
        "estimator": estimator,
        "prefix_reuse": prefix_reuse,
    }
    with Offload(offloaded, ["model.layers.1"], folder=tmp_path) as offload:
        optimizer = ZerothOrderSGD(offloaded, **(OPTIONS | options))
        for step in range(3):
            before = offload.loads
            optimizer.step(lambda: loss_of(offloaded, case))
            # the first step evaluates some times more, to see how the model uses its weights
            assert step == 0 or offload.loads - before == 2
    run(resident, case, 3, **options)
    assert_equal_models(resident, offloaded)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_dropout_draws_the_same_in_every_evaluation(kind: str, tmp_path: Path) -> None:
    case = case_of(kind)
    models = [build(case).train() for _ in range(2)]
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
    resident, offloaded = models
    mask = [b == 1 for b in range(len(case.names))]
    with Offload(offloaded, [case.names[1]], folder=tmp_path):
        seen = run(offloaded, case, 3, blocks=mask)
    assert seen == run(resident, case, 3, blocks=mask)
    assert_equal_models(resident, offloaded)


def test_autocast_of_each_evaluation_is_its_own(tmp_path: Path) -> None:
    case = case_of("llama")
    resident, offloaded = build(case), build(case)

    def step(model: nn.Module) -> tuple[float, ...]:
        optimizer = ZerothOrderSGD(
            model, **OPTIONS, blocks=[False, True, False], num_perturbations=2, prefix_reuse=False
        )
        for _ in range(2):

            def closure() -> torch.Tensor:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = loss_of(model, case)
                assert not torch.is_autocast_enabled("cpu")
                return loss

            optimizer.step(closure)
        assert optimizer.last_step is not None
        return optimizer.last_step.scalars

    with Offload(offloaded, ["model.layers.1"], folder=tmp_path):
        assert step(offloaded) == step(resident)
    assert not torch.is_autocast_enabled("cpu")


def test_weights_held_over_blocks_are_each_evaluation_s_own(tmp_path: Path) -> None:
    """A module around the blocks that reads a weight of its own in front of and behind them."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.scale = nn.Parameter(torch.randn(8))
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = self.scale
            for layer in self.layers:
                x = torch.tanh(layer(x)) * scale
            return (x * self.scale).square().mean()

    resident, offloaded = Scaled(), Scaled()
    x = torch.randn(4, 8)
    for model in (resident, offloaded):
        for p in model.layers[1].parameters():
            p.requires_grad_(False)

    def scalars(model: nn.Module) -> list[tuple[float, ...]]:
        optimizer = ZerothOrderSGD(model, **OPTIONS, num_perturbations=3)
        found = []
        for _ in range(3):
            optimizer.step(lambda: model(x))
            assert optimizer.last_step is not None
            found.append(optimizer.last_step.scalars)
        return found

    with Offload(offloaded, ["layers.0", "layers.2"], folder=tmp_path):
        assert scalars(offloaded) == scalars(resident)
    assert_equal_models(resident, offloaded)


def test_a_step_that_fails_anywhere_leaves_the_weights(tmp_path: Path) -> None:
    case = case_of("llama")
    model = build(case)
    before = {n: t.clone() for n, t in state_of(model).items()}
    calls: list[int] = []
    fail_at = -1

    def hook(*_: Any) -> None:
        calls.append(len(calls))
        if len(calls) == fail_at:
            raise MemoryError("out of memory")

    with Offload(model, ["model.layers.1"], folder=tmp_path) as offload:
        host = {n: p.data_ptr() for n, p in model.named_parameters()}
        optimizer = ZerothOrderSGD(
            model, **OPTIONS, blocks=[False, True, False], prefix_reuse=False
        )
        optimizer._evaluator._watched = True
        for name in case.names:
            model.get_submodule(name).mlp.register_forward_pre_hook(hook)
        fail_at = 1
        while True:
            calls.clear()
            try:
                optimizer.step(lambda: loss_of(model, case))
            except MemoryError:
                assert {n: p.data_ptr() for n, p in model.named_parameters()} == host
                now = state_of(model)
                assert all(torch.equal(bits_of(now[n]), bits_of(before[n])) for n in before)
                assert "forward" not in model.model.layers[1].__dict__
                fail_at += 1
                continue
            break
        assert fail_at == 7, "three blocks, two evaluations"
        assert offload.idle == ("model.layers.0", "model.layers.2")
    resident = build(case)
    reference = ZerothOrderSGD(resident, **OPTIONS, blocks=[False, True, False])
    reference.step(lambda: loss_of(resident, case))
    assert_equal_models(resident, model)


@pytest.mark.parametrize("columns", [True, False], ids=["columns", "vocabulary"])
def test_evaluations_side_by_side_read_their_own_logits(columns: bool, tmp_path: Path) -> None:
    """They go through one head, narrowed by each of them."""
    case = case_of("llama")
    rows, at = torch.arange(2), torch.tensor([5, 3])
    words = torch.tensor([7, 9]) if columns else None
    inputs = {"input_ids": torch.arange(3, 15).view(2, 6), "use_cache": False}

    def closure(model: nn.Module) -> torch.Tensor:
        logits = narrow_logits(model, inputs, rows, at, words)
        return nn.functional.cross_entropy(logits, torch.tensor([0, 1]))

    scalars, models = [], [build(case), build(case)]
    for model in models:
        with contextlib.ExitStack() as stack:
            if model is models[1]:
                stack.enter_context(Offload(model, ["model.layers.1"], folder=tmp_path))
            optimizer = ZerothOrderSGD(
                model, blocks=[False, True, False], num_perturbations=3, **OPTIONS
            )
            for _ in range(2):
                optimizer.step(lambda model=model: closure(model))
                assert optimizer.last_step is not None
                scalars.append(optimizer.last_step.scalars)
        assert "forward" not in vars(model.get_output_embeddings())
    assert scalars[:2] == scalars[2:]
    assert_equal_models(*models)
