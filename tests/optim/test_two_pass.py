"""In place with two passes a step: what is left between steps, and what restores it."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zorba import ZerothOrderSGD
from zorba.optim import step_seed

import zorba_kernels as zk
from tests.optim.models import Tied, batch, count_passes, failing, loss_of, snapshot, task
from tests.tolerances import bound

EPS = 1e-2


def close(model: nn.Module, expected: dict[str, Tensor]) -> bool:
    """Equal up to the rounding of a few passes, which is far below a perturbation."""
    limit = bound("steps in place")
    return all((p - expected[n]).abs().max() <= limit for n, p in model.named_parameters())


@pytest.fixture
def stepped(generator: torch.Generator) -> tuple[nn.Module, ZerothOrderSGD, dict[str, Tensor]]:
    """A model after three steps, its optimizer, and the weights that three passes a step give."""
    ids, labels = batch(generator)
    model, other = Tied(), Tied()
    other.load_state_dict(model.state_dict())
    optimizers = [
        ZerothOrderSGD(m, lr=0.01, eps=EPS, placement="inplace", two_pass=two, rounding="nearest")
        for m, two in ((model, True), (other, False))
    ]
    for m, optimizer in zip((model, other), optimizers, strict=True):
        for _ in range(3):
            optimizer.step(lambda m=m: loss_of(m, ids, labels))
    return model, optimizers[0], snapshot(other)


def test_weights_are_ahead_until_flush(stepped: Any) -> None:
    model, optimizer, expected = stepped
    assert not close(model, expected), "they carry the next perturbation"
    zk.add_noise_(optimizer.placement.table, step_seed(0, 3), -EPS)
    assert close(model, expected), "and nothing else"
    zk.add_noise_(optimizer.placement.table, step_seed(0, 3), EPS)
    optimizer.flush()
    assert close(model, expected)
    restored = snapshot(model)
    optimizer.flush()
    assert all(torch.equal(p, restored[n]) for n, p in model.named_parameters())


IDS = torch.zeros(1, 2, dtype=torch.long)

RESTORED_BY: dict[str, Callable[[nn.Module, ZerothOrderSGD], object]] = {
    "flush": lambda model, optimizer: optimizer.flush(),
    "a forward": lambda model, optimizer: model(IDS),
    "a forward of a part": lambda model, optimizer: model.norm(torch.zeros(1, 16)),
    "state_dict of the model": lambda model, optimizer: model.state_dict(),
    "state_dict of a part": lambda model, optimizer: model.norm.state_dict(),
    "state_dict of the optimizer": lambda model, optimizer: optimizer.state_dict(),
    "eval of the optimizer": lambda model, optimizer: optimizer.eval(),
}


@pytest.mark.parametrize("moved", [False, True], ids=["in its place", "moved"])
@pytest.mark.parametrize("event", RESTORED_BY)
def test_restored_by(event: str, moved: bool, stepped: Any) -> None:
    model, optimizer, expected = stepped
    if moved:
        model.double().float()
    read = RESTORED_BY[event](model, optimizer)
    assert close(model, expected)
    if event == "state_dict of the model":
        assert all(torch.equal(read[n], p) for n, p in model.named_parameters())


def test_weights_that_are_loaded_stay_as_loaded(stepped: Any) -> None:
    """Nothing is taken off them for a perturbation that they never had."""
    model, optimizer, expected = stepped
    model.load_state_dict(expected, strict=False)
    optimizer.flush()
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())


def test_a_model_with_hooks_can_be_copied_and_pickled(stepped: Any) -> None:
    model, optimizer, expected = stepped
    optimizer.flush()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert close(twin, expected)
        twin(IDS)


def test_the_end_of_the_optimizer_restores(generator: torch.Generator) -> None:
    model, closure = task(generator)
    before = snapshot(model)
    optimizer = ZerothOrderSGD(model, lr=0.0, eps=EPS, placement="inplace", two_pass=True)
    optimizer.step(closure)
    assert not close(model, before)
    del optimizer
    gc.collect()
    assert close(model, before)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not model._state_dict_pre_hooks


@pytest.mark.parametrize("two_pass", [False, True])
def test_passes_a_step(
    two_pass: bool, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    model, closure = task(generator)
    passes = count_passes(monkeypatch)
    optimizer = ZerothOrderSGD(model, lr=0.1, placement="inplace", two_pass=two_pass)
    # The first of two has nobody to perturb for it.
    for count in [3, 2, 2] if two_pass else [3, 3, 3]:
        optimizer.step(closure)
        assert len(passes) == count
        passes.clear()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2])
def test_a_closure_that_raises_leaves_restored_weights(
    at: int, error: type[BaseException], stepped: Any
) -> None:
    model, optimizer, expected = stepped
    with pytest.raises(error, match="injected"):
        optimizer.step(failing(lambda: model(IDS).sum(), at, error))
    assert close(model, expected)


def test_a_loss_that_is_not_finite_restores(stepped: Any) -> None:
    model, optimizer, expected = stepped
    optimizer.step(lambda: float("nan"))
    assert optimizer.last_step.skipped
    assert close(model, expected)


def test_a_change_of_eps_between_steps(stepped: Any) -> None:
    """What was added ahead is not what the next step asks for: it must not be used."""
    model, optimizer, expected = stepped
    optimizer.param_groups[0]["eps"] = 2 * EPS
    seen: list[dict[str, Tensor]] = []

    def closure() -> float:
        seen.append(snapshot(model))
        return 0.0

    optimizer.step(closure)
    model.load_state_dict(expected, strict=False)
    zk.add_noise_(optimizer.placement.table, optimizer.last_step.seed, 2 * EPS)
    assert close(model, seen[0])
