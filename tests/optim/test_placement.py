"""All placements where a step fails, and what perturbing in place costs and leaves behind."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import Tensor, nn
from zorba import ZerothOrderSGD
from zorba.optim import InplacePlacement, NoiseTerms, active_table

from tests.optim.models import assert_close, same_bits, snapshot, untouched


class _Breaks(nn.Module):
    def __init__(self, error: type[BaseException], at: int) -> None:
        super().__init__()
        self.error, self.left = error, at

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise self.error("injected")
        return x


@pytest.mark.parametrize(
    ("placement", "directions"),
    [("scratch", "shared"), ("inplace", "shared"), ("fused", "shared"), ("fused", "own")],
)
@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_closure_that_raises_leaves_the_weights(
    at: int,
    error: type[BaseException],
    placement: str,
    directions: str,
    generator: torch.Generator,
) -> None:
    """The failing module sits between two layers: the first has been perturbed when it fails."""
    model = nn.Sequential(nn.Linear(6, 6), _Breaks(error, at), nn.Linear(6, 6))
    before = snapshot(model)
    x = torch.randn(2, 6, generator=generator)
    addresses = [p.data_ptr() for p in model.parameters()]
    options = {"num_perturbations": 2, "placement": placement, "directions": directions}
    optimizer = ZerothOrderSGD(model, lr=0.1, **options)

    def closure() -> Tensor:
        return model(x).sum() if directions == "shared" else model(x).sum(1)

    with pytest.raises(error, match="injected"):
        optimizer.step(closure)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert untouched(model)
    assert placement == "inplace" or same_bits(model, before)
    assert_close(model, before, "restored in place")
    assert optimizer.param_groups[0]["step"] == 0, "a step that failed is no step"
    optimizer.step(closure)
    assert optimizer.param_groups[0]["step"] == 1


@pytest.mark.parametrize("placement", ["scratch", "inplace", "fused"])
def test_ctrl_c_reaches_the_closure(placement: str) -> None:
    model = nn.Linear(30, 30)
    before = snapshot(model)

    def closure() -> None:
        model(torch.ones(2, 30))
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the closure went on")

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
        monkeypatch.undo()
        run(*arguments)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(placement, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt), placement.session():
        placement.move_to(NoiseTerms.single(1, 0, [1.0]))
    assert_close(model, before, "restored in place")


def test_inplace_decay_acts_on_the_unperturbed_weights() -> None:
    """A flat loss: nothing but decay may move the weights, whatever the perturbation was."""
    model = nn.Linear(16, 16, bias=False)
    before = model.weight.detach().clone()
    optimizer = ZerothOrderSGD(model, lr=0.5, eps=0.1, weight_decay=0.5, placement="inplace")
    optimizer.step(lambda: 0.0)
    assert_close(model, {"weight": 0.75 * before}, "restored in place")
