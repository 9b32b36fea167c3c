"""Where losses are taken, finite differences of known functions, and the velocity."""

from __future__ import annotations

import math

import pytest
import torch
from zorba.optim import NoiseTerms, one_by_one
from zorba.optim.terms import differences, evaluation_noises, mean_loss, velocity, window

import zorba_kernels as zk

SIZE = 64


def _direction(terms: NoiseTerms) -> torch.Tensor:
    out = torch.zeros(SIZE, dtype=torch.float64)
    for k, (seed, sample) in enumerate(zip(terms.seeds, terms.samples, strict=True)):
        z = zk.noise(SIZE, seed=seed, stream=7, sample=sample).double()
        out += z * terms.coefs[:, k].double().repeat_interleave(SIZE // 2)
    return out


@pytest.mark.parametrize("active", [[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
def test_central_is_exact_on_a_quadratic(active: list[float], generator: torch.Generator) -> None:
    point = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    evaluate = one_by_one(lambda terms: float((point + _direction(terms)).square().sum()))
    losses = evaluate(evaluation_noises(5, 1e-3, 4, "central", active))
    mask = torch.tensor(active, dtype=torch.float64).repeat_interleave(SIZE // 2)
    for p, g in enumerate(differences(losses, 1e-3, "central")):
        z = zk.noise(SIZE, seed=5, stream=7, sample=p).double() * mask
        # eps in float32 is 1e-3 to 5e-8, and the difference loses about 1e-16 / 1e-3.
        assert g == pytest.approx(float(2 * point @ z), rel=1e-6, abs=1e-9)


def test_forward_evaluates_the_base_once() -> None:
    noises = evaluation_noises(5, 1e-3, 3, "forward", [1.0, 1.0])
    assert [len(terms.seeds) for terms in noises] == [0, 1, 1, 1]
    assert differences([1.0, 2.0, 0.0, 1.0], 0.5, "forward") == [2.0, -2.0, 0.0]


def test_pending_terms_ride_along() -> None:
    pending = NoiseTerms.single(9, 4, [0.25, 0.0])
    plus, minus = evaluation_noises(5, 1e-3, 1, "central", [0.0, 1.0], pending)
    assert plus.seeds == minus.seeds == (9, 5)
    assert plus.coefs[:, 0].tolist() == [0.25, 0.0]
    assert plus.coefs[0, 1] == 0.0
    assert plus.coefs[1, 1] == -minus.coefs[1, 1] == pytest.approx(1e-3)


def test_a_loss_that_is_not_finite_shows() -> None:
    assert math.isnan(mean_loss([1.0, math.inf]))
    assert not math.isfinite(differences([1.0, math.inf], 1e-3, "central")[0])


def test_terms_refuse_parts_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match="2 seeds"):
        NoiseTerms((1, 2), (0,), torch.zeros(1, 2))


def test_velocity_terms() -> None:
    assert window(0.0) == 1
    assert window(0.9) == 44
    steps = [(7, (1.0, 2.0), 0.9), (9, (4.0, -6.0), 0.5)]
    terms = velocity(steps, [-0.1, 0.0])
    assert terms.seeds == (7, 7, 9, 9)
    assert terms.samples == (0, 1, 0, 1)
    expected = torch.tensor([[-0.025, -0.05, -0.2, 0.3], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(terms.coefs, expected)
