"""A model whose idle blocks are on the host takes the steps of a resident one, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zorba import ZerothOrderSGD
from zorba.hf import narrow_logits
from zorba.offload import Offload
from zorba.offload.stream import _HostCopies

from tests.hf.steps import changed, state_of
from tests.hf.tiny import CASES, Case, build, case_of, loss_of

OPTIONS = {"lr": 1e-2, "eps": 1e-2, "seed": 3}
LLAMA = case_of("llama")
MIDDLE = {"blocks": [False, True, False]}


def run(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], steps: int, **options: Any
) -> list[tuple[float, ...]]:
    optimizer = ZerothOrderSGD(model, **(OPTIONS | options))
    scalars = []
    for step in range(steps):
        torch.manual_seed(step)  # of dropout
        optimizer.step(lambda: loss(model))
        assert optimizer.last_step is not None
        scalars.append(optimizer.last_step.scalars)
    return scalars


def check(
    models: list[nn.Module],
    active: list[str],
    folder: Path,
    loss: Callable[[nn.Module], Tensor],
    **options: Any,
) -> None:
    resident, offloaded = models
    with Offload(offloaded, active, folder=folder):
        seen = run(offloaded, loss, 2, **options)
    assert seen == run(resident, loss, 2, **options)
    assert changed(offloaded, state_of(resident)) == []


def mask_of(case: Case, rng: Any) -> list[bool]:
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
    active = [name for name, on in zip(case.names, mask, strict=True) if on]
    models = [build(case), build(case)]
    options = {"blocks": mask, "num_perturbations": 2}
    check(models, active, tmp_path, lambda model: loss_of(model, case), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["central", "forward"])
@pytest.mark.parametrize("prefix_reuse", [True, False])
def test_each_idle_block_is_brought_once_a_step(
    dtype: torch.dtype,
    estimator: str,
    prefix_reuse: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resident, offloaded = build(LLAMA, dtype), build(LLAMA, dtype)
    options = {"estimator": estimator, "prefix_reuse": prefix_reuse, "num_perturbations": 3}
    copies, start = [], _HostCopies.start
    monkeypatch.setattr(_HostCopies, "start", lambda *args: (copies.append(args), start(*args))[1])
    with Offload(offloaded, ["model.layers.1"], folder=tmp_path):
        optimizer = ZerothOrderSGD(offloaded, **OPTIONS, **MIDDLE, **options)
        for step in range(3):
            copies.clear()
            optimizer.step(lambda: loss_of(offloaded, LLAMA))
            # the first step evaluates some times more, to see how the model uses its weights
            assert step == 0 or len(copies) == 2
    run(resident, lambda model: loss_of(model, LLAMA), 3, **MIDDLE, **options)
    assert changed(offloaded, state_of(resident)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(
    "options",
    [
        {"directions": "shared"},
        {"num_perturbations": 3},
        {"num_perturbations": 2, "estimator": "forward", "prefix_reuse": False},
        {"placement": "scratch", "prefix_reuse": False},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_own_directions_and_noise_in_layers(
    options: dict[str, Any], kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Rows and directions of each evaluation that runs beside others are its own."""
    options = {"placement": "fused", "directions": "own", "distribution": "rank1"} | options
    own, case = options["directions"] == "own", case_of(kind)
    ids = torch.randint(3, 50, (5, 6), generator=torch.Generator().manual_seed(2))

    def loss(model: nn.Module) -> Tensor:
        logits = model(input_ids=ids).logits[:, :-1].float().transpose(1, 2)
        found = nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").mean(1)
        return found if own else found.mean()

    models = [build(case, dtype), build(case, dtype)]
    options |= {**MIDDLE, "examples_per_direction": 2}
    check(models, [case.names[1]], tmp_path, loss, **options)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_dropout_draws_the_same_in_every_evaluation(kind: str, tmp_path: Path) -> None:
    case = case_of(kind)
    models = [build(case).train() for _ in range(2)]
    for module in (module for model in models for module in model.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    mask = [b == 1 for b in range(len(case.names))]
    check(models, [case.names[1]], tmp_path, lambda model: loss_of(model, case), blocks=mask)


def test_autocast_of_each_evaluation_is_its_own(tmp_path: Path) -> None:
    def loss(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            found = loss_of(model, LLAMA)
        assert not torch.is_autocast_enabled("cpu")
        return found

    options = {**MIDDLE, "num_perturbations": 2, "prefix_reuse": False}
    check([build(LLAMA), build(LLAMA)], ["model.layers.1"], tmp_path, loss, **options)
    assert not torch.is_autocast_enabled("cpu")


class Scaled(nn.Module):
    """Reads a weight of its own in front of its blocks and behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.scale = nn.Parameter(torch.randn(8))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.layers[1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale
        for layer in self.layers:
            x = torch.tanh(layer(x)) * scale
        return (x * self.scale).square().mean()


def test_weights_held_over_blocks_are_each_evaluation_s_own(tmp_path: Path) -> None:
    x, active = torch.randn(4, 8), ["layers.0", "layers.2"]
    check([Scaled(), Scaled()], active, tmp_path, lambda model: model(x), num_perturbations=3)


@pytest.mark.parametrize("columns", [True, False], ids=["columns", "vocabulary"])
def test_evaluations_side_by_side_read_their_own_logits(columns: bool, tmp_path: Path) -> None:
    """They go through one head, narrowed by each of them."""
    rows, at = torch.arange(2), torch.tensor([5, 3])
    words = torch.tensor([7, 9]) if columns else None
    inputs = {"input_ids": torch.arange(3, 15).view(2, 6), "use_cache": False}

    def loss(model: nn.Module) -> Tensor:
        logits = narrow_logits(model, inputs, rows, at, words)
        return nn.functional.cross_entropy(logits, torch.tensor([0, 1]))

    models = [build(LLAMA), build(LLAMA)]
    check(models, ["model.layers.1"], tmp_path, loss, **MIDDLE, num_perturbations=3)
    assert not any("forward" in vars(model.get_output_embeddings()) for model in models)


def test_a_step_that_fails_anywhere_leaves_the_weights(tmp_path: Path) -> None:
    resident, model = build(LLAMA), build(LLAMA)
    before = state_of(model)
    calls: list[int] = []
    fail_at = 1

    def hook(*_: Any) -> None:
        calls.append(len(calls))
        if len(calls) == fail_at:
            raise MemoryError("out of memory")

    with Offload(model, ["model.layers.1"], folder=tmp_path) as offload:
        host = {n: p.data_ptr() for n, p in model.named_parameters()}
        optimizer = ZerothOrderSGD(model, **OPTIONS, **MIDDLE, prefix_reuse=False)
        optimizer._evaluator._watched = True
        for name in LLAMA.names:
            model.get_submodule(name).mlp.register_forward_pre_hook(hook)
        while True:
            calls.clear()
            try:
                optimizer.step(lambda: loss_of(model, LLAMA))
                break
            except MemoryError:
                assert {n: p.data_ptr() for n, p in model.named_parameters()} == host
                assert changed(model, before) == []
                assert "forward" not in model.model.layers[1].__dict__
                fail_at += 1
        assert fail_at == 7, "three blocks, two evaluations"
        assert offload.idle == ("model.layers.0", "model.layers.2")
    run(resident, lambda model: loss_of(model, LLAMA), 1, **MIDDLE)
    assert changed(model, state_of(resident)) == []
