"""Scratch and in-place placements: what they show a model, and what they leave behind."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import Tensor, nn
from zorba import ZerothOrderSGD
from zorba.optim import (
    InplacePlacement,
    NoiseTerms,
    ScratchPlacement,
    UnreachedParameterError,
    active_table,
)

import zorba_kernels as zk
from tests.optim.models import (
    Adapter,
    Tied,
    assert_close,
    batch,
    count_passes,
    loss_of,
    same_bits,
    snapshot,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scratch_shows_what_an_in_place_pass_would_make(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    model, (ids, _) = Tied(dtype), batch(generator)
    before = snapshot(model)
    placement = ScratchPlacement(model, active_table(model), "gaussian")
    with torch.no_grad():
        with placement.session():
            placement.move_to(NoiseTerms.single(3, 1, [0.05]))
            seen = model(ids)
        assert same_bits(model, before)
        zk.add_noise_(placement.table, 3, 0.05, samples=1)
        assert torch.equal(model(ids), seen)


def test_scratch_serves_nested_owners(generator: torch.Generator) -> None:
    model = Adapter()
    x = torch.randn(3, 8, generator=generator)
    placement = ScratchPlacement(model, active_table(model), "rademacher")
    with torch.no_grad():
        with placement.session():
            placement.move_to(NoiseTerms.single(3, 0, [0.5]))
            seen = model(x)
        zk.add_noise_(placement.table, 3, 0.5, "rademacher")
        assert torch.equal(model(x), seen)


def test_scratch_is_no_larger_than_the_largest_module(generator: torch.Generator) -> None:
    model, (ids, labels) = Tied(), batch(generator)
    optimizer = ZerothOrderSGD(model, lr=0.1)
    optimizer.step(lambda: loss_of(model, ids, labels))
    assert isinstance(optimizer.placement, ScratchPlacement)
    largest = model.embed.weight.numel() * 4
    assert optimizer.placement.scratch_bytes <= largest + 128


def test_groups_with_zero_coefficients_are_not_perturbed(generator: torch.Generator) -> None:
    model, (ids, _) = Tied(), batch(generator)
    names = [name for name, _ in model.named_parameters()]
    groups = {name: int(name.startswith("layers.1")) for name in names}
    placement = ScratchPlacement(model, active_table(model, groups), "gaussian")
    with torch.no_grad():
        with placement.session():
            placement.move_to(NoiseTerms.single(3, 0, [0.0, 0.1]))
            seen = model(ids)
        zk.add_noise_(placement.table, 3, [[0.0], [0.1]])
        assert torch.equal(model(ids), seen)


def test_no_hook_is_left_on_the_model(generator: torch.Generator) -> None:
    model, (ids, labels) = Tied(), batch(generator)
    ZerothOrderSGD(model, lr=0.1).step(lambda: loss_of(model, ids, labels))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- Failures ------------------------------------------------------------------------------------


class _Breaks(nn.Module):
    """Raises in the n-th forward that it sees."""

    def __init__(self, error: type[BaseException], at: int) -> None:
        super().__init__()
        self.error, self.left = error, at

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise self.error("injected")
        return x


@pytest.mark.parametrize("placement", ["scratch", "inplace"])
@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_closure_that_raises_leaves_the_weights(
    at: int, error: type[BaseException], placement: str, generator: torch.Generator
) -> None:
    """The failing module sits between two layers: the first has been perturbed when it fails."""
    model = nn.Sequential(nn.Linear(6, 6), _Breaks(error, at), nn.Linear(6, 6))
    before = snapshot(model)
    x = torch.randn(2, 6, generator=generator)
    optimizer = ZerothOrderSGD(model, lr=0.1, num_perturbations=2, placement=placement)
    with pytest.raises(error, match="injected"):
        optimizer.step(lambda: model(x).sum())
    if placement == "scratch":
        assert same_bits(model, before)
    assert_close(model, before, "restored in place")
    step = optimizer.param_groups[0]["step"]
    assert step == 0, "a step that failed is no step"
    optimizer.step(lambda: model(x).sum())
    assert optimizer.param_groups[0]["step"] == 1


@pytest.mark.parametrize("placement", ["scratch", "inplace"])
def test_ctrl_c_in_the_middle_of_a_step(placement: str, generator: torch.Generator) -> None:
    model = nn.Linear(300, 300)
    before = snapshot(model)
    x = torch.randn(2, 300, generator=generator)

    def closure() -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return model(x).sum()

    with pytest.raises(KeyboardInterrupt):
        ZerothOrderSGD(model, lr=0.1, placement=placement).step(closure)
    assert_close(model, before, "restored in place")


def test_an_interrupt_during_a_pass_is_delivered_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The note that a pass was made must not be lost: the weights would stay perturbed."""
    model = nn.Linear(8, 8)
    before = snapshot(model)
    placement = InplacePlacement(active_table(model), "gaussian")
    run = placement._run

    def interrupted(*arguments: object) -> None:
        run(*arguments)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGINT)

    def perturb() -> None:
        with placement.session():
            monkeypatch.setattr(placement, "_run", interrupted)
            try:
                placement.move_to(NoiseTerms.single(1, 0, [1.0]))
            finally:
                monkeypatch.setattr(placement, "_run", run)

    with pytest.raises(KeyboardInterrupt):
        perturb()
    assert_close(model, before, "restored in place")


def test_inplace_costs_three_passes_a_central_difference(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    model, (ids, labels) = Tied(), batch(generator)
    passes = count_passes(monkeypatch)
    ZerothOrderSGD(model, lr=0.1, placement="inplace").step(lambda: loss_of(model, ids, labels))
    assert len(passes) == 3


def test_parameters_that_share_storage_are_perturbed_in_every_module(
    generator: torch.Generator,
) -> None:
    """Tied by ``.data``, not by identity: the second module must see the noise as well."""
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False))
    model[2].weight.data = model[0].weight.data
    x = torch.randn(3, 6, generator=generator)
    placement = ScratchPlacement(model, active_table(model), "gaussian")
    with torch.no_grad():
        with placement.session():
            placement.move_to(NoiseTerms.single(3, 0, [0.5]))
            seen = model(x)
        zk.add_noise_(placement.table, 3, 0.5)
        assert torch.equal(model(x), seen)


def test_names_that_collide_without_prefixes_are_refused() -> None:
    model = nn.Linear(3, 3)
    model.module = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="two parameters are called 'weight'"):
        active_table(model)


def test_a_session_of_one_evaluation_finds_unreached_parameters() -> None:
    model = nn.Linear(4, 4)
    placement = ScratchPlacement(model, active_table(model), "gaussian")

    def evaluate() -> None:
        with placement.session():
            placement.move_to(NoiseTerms.single(1, 0, [0.1]))
            nn.functional.linear(torch.ones(1, 4), model.weight)

    with pytest.raises(UnreachedParameterError, match="weight"):
        evaluate()


def test_nested_owners_cost_the_largest_of_each_level(generator: torch.Generator) -> None:
    model = Adapter()
    optimizer = ZerothOrderSGD(model, lr=0.1)
    x = torch.randn(3, 8, generator=generator)
    optimizer.step(lambda: model(x).square().mean())
    assert isinstance(optimizer.placement, ScratchPlacement)
    # the scale: 8 floats; the layer inside: 64 + 8 floats, its parameters 64 bytes apart
    assert optimizer.placement.scratch_bytes == 64 + 256 + 64


def test_inplace_decay_acts_on_the_unperturbed_weights() -> None:
    """A flat loss: nothing but decay may move the weights, whatever the perturbation was."""
    model = nn.Linear(16, 16, bias=False)
    before = model.weight.detach().clone()
    optimizer = ZerothOrderSGD(model, lr=0.5, eps=0.1, weight_decay=0.5, placement="inplace")
    optimizer.step(lambda: 0.0)
    assert_close(model, {"weight": 0.75 * before}, "restored in place")
