"""ZerothOrderSGD against its definition, and as a torch optimizer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from zorba import ZerothOrderSGD
from zorba.optim import active_table, step_seed

import zorba_kernels as zk
from tests.optim.models import Tied, assert_close, batch, loss_of, same_bits, snapshot, task
from tests.tolerances import bound


@pytest.mark.parametrize(
    ("placement", "dtype", "directions"),
    [
        ("scratch", torch.bfloat16, 1_000),
        ("scratch", torch.float16, 500),
        ("scratch", torch.float32, 500),
        ("fused", torch.bfloat16, 1_000),
        ("fused", torch.float16, 500),
        ("fused", torch.float32, 1_000),
        ("inplace", torch.float32, 20),
    ],
)
def test_steps_without_learning_rate_keep_every_bit(
    placement: str, dtype: torch.dtype, directions: int, full: bool, generator: torch.Generator
) -> None:
    """In place to rounding. Twice as many evaluations as directions come and go, one by one."""
    directions *= 10 if full and placement != "inplace" else 1
    model = nn.Linear(7, 3).to(dtype)
    before = snapshot(model)
    x = torch.randn(5, 7, generator=generator).to(dtype)
    optimizer = ZerothOrderSGD(
        model, lr=0.0, eps=1e-2, num_perturbations=10, placement=placement, rounding="nearest"
    )
    losses = {
        float(optimizer.step(lambda: model(x).float().square().mean()))
        for _ in range(directions // 10)
    }
    assert placement == "inplace" or same_bits(model, before)
    assert_close(model, before, "steps in place")
    assert len(losses) > 1, "the losses never saw a perturbation"


@pytest.mark.parametrize("estimator", ["central", "forward"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("placement", ["scratch", "inplace"])
def test_step_is_its_definition(
    placement: str, distribution: str, estimator: str, generator: torch.Generator
) -> None:
    model, closure = task(generator)
    start = snapshot(model)
    lr, eps, count = 0.05, 1e-2, 3
    optimizer = ZerothOrderSGD(
        model, lr, eps, count, estimator, distribution, placement, rounding="nearest", seed=11
    )
    optimizer.step(closure)
    stepped, key = snapshot(model), step_seed(11, 0)

    def loss_at(sample: int, scale: float) -> float:
        model.load_state_dict(start, strict=False)
        if scale:
            zk.add_noise_(active_table(model), key, scale, distribution, samples=sample)
        with torch.no_grad():
            return float(closure())

    below, distance = (-eps, 2 * eps) if estimator == "central" else (0.0, eps)
    scalars = [(loss_at(p, eps) - loss_at(p, below)) / distance for p in range(count)]
    seen = list(optimizer.last_step.scalars)
    model.load_state_dict(start, strict=False)
    coefs = [-lr * g / count for g in seen]
    zk.add_noise_(active_table(model), [key] * count, coefs, distribution, samples=range(count))
    if placement == "scratch":
        assert seen == scalars
        assert same_bits(model, stepped)
    else:
        limit = bound("scalar in place")
        torch.testing.assert_close(torch.tensor(seen), torch.tensor(scalars), rtol=limit, atol=1e-3)
        assert_close(model, stepped, "steps in place")
        assert not all(torch.equal(stepped[n], w) for n, w in start.items())


@pytest.mark.parametrize("two_pass", [False, True])
def test_in_place_is_exact_where_float32_is(two_pass: bool) -> None:
    """Signs, powers of two and small integers: no pass and no loss of three steps rounds."""
    model = nn.Linear(8, 4, bias=False)
    expected = torch.arange(-16.0, 16.0).reshape(4, 8) / 32
    model.weight.data.copy_(expected)
    eps, lr, signs = 2.0**-5, 2.0**-9, "rademacher"
    optimizer = ZerothOrderSGD(
        model, lr, eps, distribution=signs, placement="inplace", two_pass=two_pass
    )
    stream = zk.noise.stream_of("weight")
    for step in range(3):
        optimizer.step(lambda: model(torch.ones(1, 8)).sum())
        z = zk.noise((4, 8), seed=step_seed(0, step), stream=stream, distribution=signs)
        assert optimizer.last_step.scalars == (float(z.sum()),)
        expected = expected - lr * z.sum() * z
    optimizer.flush()
    assert torch.equal(model.weight.detach(), expected)


def test_loss_falls_without_a_gradient(generator: torch.Generator) -> None:
    model, loss = task(generator)

    def closure() -> torch.Tensor:
        assert not loss().requires_grad
        return loss()

    optimizer = ZerothOrderSGD(model, lr=0.02, num_perturbations=4)
    before = float(loss().detach())
    optimizer.step(closure)
    for _ in range(150):
        optimizer.step(loss)
    assert float(loss().detach()) < 0.8 * before
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"placement": "inplace", "two_pass": True}],
    ids=["plain", "momentum", "two passes"],
)
def test_resumed_run_equals_the_uninterrupted_one(
    options: dict[str, Any], generator: torch.Generator
) -> None:
    ids, labels = batch(generator)
    whole, parted = Tied(torch.bfloat16), Tied(torch.bfloat16)
    parted.load_state_dict(whole.state_dict())
    one = ZerothOrderSGD(whole, lr=0.1, seed=5, **options)
    first = ZerothOrderSGD(parted, lr=0.1, seed=5, **options)
    second = ZerothOrderSGD(parted, lr=9.9, seed=77, **options)
    for step in range(8):
        if step == 4:
            one.state_dict()  # restores in place
            second.load_state_dict(first.state_dict())
        one.step(lambda: loss_of(whole, ids, labels))
        (first if step < 4 else second).step(lambda: loss_of(parted, ids, labels))
    assert same_bits(parted, snapshot(whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_decay_shrinks_by_lr_times_decay(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    """A flat loss leaves decay alone to act: 200 steps of 5e-4 multiply by (1 - 5e-4)^200."""
    model = nn.Linear(64, 64, bias=False).to(dtype)
    before = model.weight.detach().float().clone()
    optimizer = ZerothOrderSGD(model, lr=1e-2, weight_decay=5e-2)
    x = torch.zeros(1, 64, dtype=dtype)
    for _ in range(200):
        optimizer.step(lambda: model(x).sum())
    ratio = (model.weight.detach().float() * before).sum() / before.square().sum()
    assert float(ratio) == pytest.approx((1 - 5e-4) ** 200, abs=bound("decay of bfloat16"))


def test_dropout_is_the_same_in_both_evaluations(generator: torch.Generator) -> None:
    """Without common dropout masks the difference of a flat direction would not be 0."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).train()
    x = torch.randn(16, 8, generator=generator)
    optimizer = ZerothOrderSGD(model, lr=0.0, eps=1e-30)
    optimizer.step(lambda: model(x).square().mean())
    assert optimizer.last_step.scalars == (0.0,)


@pytest.mark.filterwarnings("ignore:placement='fused' cannot")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("placement", ["scratch", "inplace", "fused"])
def test_a_loss_that_is_not_finite_skips_the_step(
    placement: str, value: float, generator: torch.Generator
) -> None:
    model, closure = task(generator)
    before = snapshot(model)
    optimizer = ZerothOrderSGD(model, lr=0.1, placement=placement)
    loss = optimizer.step(lambda: closure() + value)
    assert optimizer.last_step.skipped
    assert not math.isfinite(float(loss))
    if placement != "inplace":
        assert same_bits(model, before)
    assert_close(model, before, "restored in place")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"lr": -1.0}, ValueError, "lr"),
        ({"lr": math.nan}, ValueError, "lr"),
        ({"eps": 0.0}, ValueError, "eps"),
        ({"num_perturbations": 0}, ValueError, "num_perturbations"),
        ({"num_perturbations": 1.5}, TypeError, "num_perturbations"),
        ({"estimator": "backward"}, ValueError, "central"),
        ({"distribution": "cauchy"}, ValueError, "rademacher"),
        ({"placement": "moon"}, ValueError, "scratch"),
        ({"rounding": "up"}, ValueError, "stochastic"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay"),
        ({"seed": -1}, ValueError, "seed"),
        ({"momentum": -0.1}, ValueError, "momentum"),
        ({"momentum": 1.0}, ValueError, "momentum"),
        ({"clip": 0.0}, ValueError, "clip"),
        ({"model": Tied().parameters()}, TypeError, "model"),
        ({"model": Tied().requires_grad_(False)}, ValueError, "requires_grad"),
        ({"two_pass": True}, ValueError, "two_pass is for"),
        ({"two_pass": True, "placement": "inplace", "estimator": "forward"}, ValueError, "central"),
    ],
)
def test_bad_arguments_say_what_was_wrong(
    change: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        ZerothOrderSGD(**{"model": Tied(), "lr": 0.1, **change})


def test_what_comes_too_late_is_refused() -> None:
    optimizer = ZerothOrderSGD(Tied(), lr=0.1)
    other = ZerothOrderSGD(Tied(), lr=0.1, distribution="rademacher")
    with pytest.raises(ValueError, match="closure"):
        optimizer.step()
    with pytest.raises(ValueError, match="takes its parameters from the model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="distribution 'rademacher'"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["distribution"] == "gaussian"


@pytest.mark.filterwarnings("ignore:placement='fused' cannot")
@pytest.mark.parametrize("placement", ["scratch", "inplace", "fused"])
def test_it_follows_a_model_that_moves(placement: str, generator: torch.Generator) -> None:
    """To another dtype, or other storage, as ``accelerator.prepare`` does after construction."""
    ids, labels = batch(generator)
    moved, fresh = Tied(), Tied()
    fresh.load_state_dict(moved.state_dict())
    options = {"lr": 0.1, "placement": placement, "seed": 3}
    one, other = ZerothOrderSGD(moved, **options), ZerothOrderSGD(fresh, **options)
    for step in range(3):
        if step == 1:
            moved.to(torch.bfloat16)
            fresh.to(torch.bfloat16)
        for p in moved.parameters():
            p.data = p.data.clone()
        one.step(lambda: loss_of(moved, ids, labels))
        made = ZerothOrderSGD(fresh, **options)
        made.load_state_dict(other.state_dict())
        made.step(lambda: loss_of(fresh, ids, labels))
        other = made
    assert same_bits(moved, snapshot(fresh))
