"""Finite differences on functions whose derivatives are known."""

from __future__ import annotations

import math

import pytest
import torch
from zorba.optim import NoiseTerms, one_by_one
from zorba.optim.terms import differences, evaluation_noises, mean_loss


def finite_differences(evaluate, seed, eps, count, estimator, active, pending=None):
    losses = evaluate(evaluation_noises(seed, eps, count, estimator, active, pending))
    return differences(losses, eps, estimator), mean_loss(losses)


import zorba_kernels as zk

SIZE = 64


def _direction(terms: NoiseTerms) -> torch.Tensor:
    """The noise of some terms on two groups of 32 elements, as a flat vector."""
    out = torch.zeros(SIZE, dtype=torch.float64)
    for k, (seed, sample) in enumerate(zip(terms.seeds, terms.samples, strict=True)):
        z = zk.noise(SIZE, seed=seed, stream=7, sample=sample).double()
        out += z * terms.coefs[:, k].double().repeat_interleave(SIZE // 2)
    return out


@pytest.mark.parametrize("active", [[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
def test_central_is_exact_on_a_quadratic(active: list[float], generator: torch.Generator) -> None:
    point = torch.randn(SIZE, generator=generator, dtype=torch.float64)

    def loss(terms: NoiseTerms) -> float:
        return float((point + _direction(terms)).square().sum())

    scalars, _ = finite_differences(one_by_one(loss), 5, 1e-3, 4, "central", active)
    mask = torch.tensor(active, dtype=torch.float64).repeat_interleave(SIZE // 2)
    for p, g in enumerate(scalars):
        z = zk.noise(SIZE, seed=5, stream=7, sample=p).double() * mask
        # eps in float32 is 1e-3 to 5e-8, and the difference loses about 1e-16 / 1e-3.
        assert g == pytest.approx(float(2 * point @ z), rel=1e-6, abs=1e-9)


def test_forward_evaluates_the_base_once() -> None:
    seen: list[NoiseTerms] = []

    def loss(terms: NoiseTerms) -> float:
        seen.append(terms)
        return float(_direction(terms).sum())

    scalars, _ = finite_differences(one_by_one(loss), 5, 1e-3, 3, "forward", [1.0, 1.0])
    assert [len(terms.seeds) for terms in seen] == [0, 1, 1, 1]
    assert len(scalars) == 3


def test_pending_terms_ride_along() -> None:
    pending = NoiseTerms.single(9, 4, [0.25, 0.0])
    seen: list[NoiseTerms] = []

    def loss(terms: NoiseTerms) -> float:
        seen.append(terms)
        return 0.0

    finite_differences(one_by_one(loss), 5, 1e-3, 1, "central", [0.0, 1.0], pending)
    assert [terms.seeds for terms in seen] == [(9, 5), (9, 5)]
    assert seen[0].coefs[:, 0].tolist() == [0.25, 0.0]
    assert seen[0].coefs[0, 1] == 0.0
    assert seen[0].coefs[1, 1] == -seen[1].coefs[1, 1] == pytest.approx(1e-3)


def test_mean_loss_is_nan_where_a_loss_is() -> None:
    losses = iter([1.0, math.inf])
    scalars, mean = finite_differences(
        one_by_one(lambda _: next(losses)), 5, 1e-3, 1, "central", [1.0]
    )
    assert math.isnan(mean)
    assert not math.isfinite(scalars[0])


def test_terms_refuse_parts_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match="2 seeds"):
        NoiseTerms((1, 2), (0,), torch.zeros(1, 2))
