"""ZerothOrderSGD against its definition, and as a torch optimizer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from zorba import ZerothOrderSGD
from zorba.optim import active_table, step_seed

import zorba_kernels as zk
from tests.optim.models import Tied, assert_close, batch, loss_of, same_bits, snapshot
from tests.tolerances import bound


@pytest.mark.parametrize(
    ("dtype", "steps"),
    [(torch.bfloat16, 10_000), (torch.float16, 500), (torch.float32, 500)],
)
def test_steps_without_learning_rate_keep_every_bit(
    dtype: torch.dtype, steps: int, generator: torch.Generator
) -> None:
    model = nn.Sequential(nn.Linear(7, 3), nn.LayerNorm(3)).to(dtype)
    before = snapshot(model)
    x = torch.randn(5, 7, generator=generator).to(dtype)
    optimizer = ZerothOrderSGD(model, lr=0.0, eps=1e-2)
    first = None
    for _ in range(steps):
        loss = optimizer.step(lambda: model(x).float().square().mean())
        first = loss if first is None else first
    assert same_bits(model, before)
    assert float(loss) != float(first), "the losses never saw a perturbation"


@pytest.mark.parametrize("estimator", ["central", "forward"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("placement", ["scratch", "inplace"])
def test_step_is_its_definition(
    placement: str, distribution: str, estimator: str, generator: torch.Generator
) -> None:
    """Perturb copies by hand with the noise op, and apply the update by hand."""
    model, (ids, labels) = Tied(), batch(generator)
    start = snapshot(model)
    lr, eps, count, seed = 0.05, 1e-2, 3, 11
    optimizer = ZerothOrderSGD(
        model,
        lr,
        eps,
        num_perturbations=count,
        estimator=estimator,
        distribution=distribution,
        placement=placement,
        rounding="nearest",
        seed=seed,
    )
    optimizer.step(lambda: loss_of(model, ids, labels))
    stepped = snapshot(model)
    key = step_seed(seed, 0)

    def loss_at(sample: int, scale: float) -> float:
        model.load_state_dict(start, strict=False)
        if scale:
            zk.add_noise_(active_table(model), key, scale, distribution, samples=sample)
        with torch.no_grad():
            return float(loss_of(model, ids, labels))

    scalars = []
    for p in range(count):
        low, distance = (
            (loss_at(p, -eps), 2 * eps) if estimator == "central" else (loss_at(p, 0), eps)
        )
        scalars.append((loss_at(p, eps) - low) / distance)
    assert optimizer.last_step is not None
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
    eps, lr, stream = 2.0**-5, 2.0**-9, zk.noise.stream_of("weight")
    optimizer = ZerothOrderSGD(
        model, lr, eps, distribution="rademacher", placement="inplace", two_pass=two_pass
    )
    for step in range(3):
        optimizer.step(lambda: model(torch.ones(1, 8)).sum())
        z = zk.noise(
            expected.shape, seed=step_seed(0, step), stream=stream, distribution="rademacher"
        )
        assert optimizer.last_step is not None
        assert optimizer.last_step.scalars == (float(z.sum()),)
        expected = expected - lr * z.sum() * z
    optimizer.flush()
    assert torch.equal(model.weight.detach(), expected)


def test_loss_falls(generator: torch.Generator) -> None:
    model, (ids, labels) = Tied(), batch(generator)
    optimizer = ZerothOrderSGD(model, lr=0.02, num_perturbations=4)
    before = float(loss_of(model, ids, labels).detach())
    for _ in range(150):
        optimizer.step(lambda: loss_of(model, ids, labels))
    assert float(loss_of(model, ids, labels).detach()) < 0.8 * before


def test_no_gradient_is_ever_made(generator: torch.Generator) -> None:
    model, (ids, labels) = Tied(), batch(generator)

    def closure() -> torch.Tensor:
        loss = loss_of(model, ids, labels)
        assert not loss.requires_grad
        return loss

    ZerothOrderSGD(model, lr=0.1).step(closure)
    assert all(p.grad is None for p in model.parameters())


def test_resumed_run_equals_the_uninterrupted_one(generator: torch.Generator) -> None:
    ids, labels = batch(generator)
    whole, parted = Tied(torch.bfloat16), Tied(torch.bfloat16)
    parted.load_state_dict(whole.state_dict())
    one = ZerothOrderSGD(whole, lr=0.1, seed=5)
    for _ in range(6):
        one.step(lambda: loss_of(whole, ids, labels))
    first = ZerothOrderSGD(parted, lr=0.1, seed=5)
    for _ in range(3):
        first.step(lambda: loss_of(parted, ids, labels))
    second = ZerothOrderSGD(parted, lr=9.9, seed=77)
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        second.step(lambda: loss_of(parted, ids, labels))
    assert same_bits(parted, snapshot(whole))


def test_schedulers_change_the_learning_rate(generator: torch.Generator) -> None:
    model, (ids, labels) = Tied(), batch(generator)
    optimizer = ZerothOrderSGD(model, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0)
    before = snapshot(model)
    optimizer.step(lambda: loss_of(model, ids, labels))
    scheduler.step()
    assert same_bits(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_decay_shrinks_by_lr_times_decay(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    """A flat loss leaves decay alone to act: 1,000 steps of 1e-4 multiply by (1 - 1e-4)^1000."""
    model = nn.Linear(64, 64, bias=False).to(dtype)
    before = model.weight.detach().float().clone()
    optimizer = ZerothOrderSGD(model, lr=1e-2, weight_decay=1e-2)
    x = torch.zeros(1, 64, dtype=dtype)
    for _ in range(1000):
        optimizer.step(lambda: model(x).sum())
    ratio = (model.weight.detach().float() * before).sum() / before.square().sum()
    assert float(ratio) == pytest.approx((1 - 1e-4) ** 1000, abs=bound("decay of bfloat16"))


def test_dropout_is_the_same_in_both_evaluations(generator: torch.Generator) -> None:
    """Without common dropout masks the difference of a flat direction would not be 0."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).train()
    x = torch.randn(16, 8, generator=generator)
    optimizer = ZerothOrderSGD(model, lr=0.0, eps=1e-30)
    optimizer.step(lambda: model(x).square().mean())
    assert optimizer.last_step is not None
    assert optimizer.last_step.scalars == (0.0,)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("placement", ["scratch", "inplace"])
def test_a_loss_that_is_not_finite_skips_the_step(
    placement: str, value: float, generator: torch.Generator
) -> None:
    model, (ids, labels) = Tied(), batch(generator)
    before = snapshot(model)
    optimizer = ZerothOrderSGD(model, lr=0.1, placement=placement)
    loss = optimizer.step(lambda: loss_of(model, ids, labels) + value)
    assert optimizer.last_step is not None
    assert optimizer.last_step.skipped
    assert not math.isfinite(float(loss))
    if placement == "scratch":
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
    ],
)
def test_bad_arguments_say_what_was_wrong(
    change: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        ZerothOrderSGD(Tied(), **{"lr": 0.1, **change})


def test_parameters_in_place_of_the_model_are_refused() -> None:
    with pytest.raises(TypeError, match="model"):
        ZerothOrderSGD(Tied().parameters(), lr=0.1)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="requires_grad"):
        ZerothOrderSGD(Tied().requires_grad_(False), lr=0.1)


def test_step_without_closure_is_refused() -> None:
    with pytest.raises(ValueError, match="closure"):
        ZerothOrderSGD(Tied(), lr=0.1).step()


@pytest.mark.parametrize("placement", ["scratch", "inplace"])
def test_it_follows_a_model_that_moves(placement: str, generator: torch.Generator) -> None:
    """To another dtype, or other storage, as ``accelerator.prepare`` does after construction."""
    ids, labels = batch(generator)
    moved, fresh = Tied(), Tied()
    fresh.load_state_dict(moved.state_dict())
    options = {"lr": 0.1, "placement": placement, "seed": 3}
    one = ZerothOrderSGD(moved, **options)
    one.step(lambda: loss_of(moved, ids, labels))
    moved.to(torch.bfloat16)
    one.step(lambda: loss_of(moved, ids, labels))
    for p in moved.parameters():
        p.data = p.data.clone()
    one.step(lambda: loss_of(moved, ids, labels))
    first = ZerothOrderSGD(fresh, **options)
    first.step(lambda: loss_of(fresh, ids, labels))
    fresh.to(torch.bfloat16)
    for _ in range(2):
        second = ZerothOrderSGD(fresh, **options)
        second.load_state_dict(first.state_dict())
        second.step(lambda: loss_of(fresh, ids, labels))
        first = second
    assert same_bits(moved, snapshot(fresh))


def test_frozen_parameters_stay(generator: torch.Generator) -> None:
    model, (ids, labels) = Tied(), batch(generator)
    model.embed.requires_grad_(False)
    frozen = model.embed.weight.detach().clone()
    ZerothOrderSGD(model, lr=0.1).step(lambda: loss_of(model, ids, labels))
    assert torch.equal(model.embed.weight.detach(), frozen)


def test_a_state_of_other_noise_is_refused() -> None:
    state = ZerothOrderSGD(Tied(), lr=0.1, distribution="rademacher").state_dict()
    optimizer = ZerothOrderSGD(Tied(), lr=0.1)
    with pytest.raises(ValueError, match="distribution 'rademacher'"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["distribution"] == "gaussian"
