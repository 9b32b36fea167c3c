"""Stochastic rounding: unbiased, also where updates are far below the precision of the weight.

Seeds are frozen, so the measured figures are constants of the contract.
"""

from __future__ import annotations

import math

import pytest
import torch

import zorba_kernels as zk
from tests.kernels.bits import changed
from tests.tolerances import STANDARD_ERRORS, bound

STREAM = zk.noise.stream_of("w")

# Weight, and a change in units of the step of the dtype at that weight. Both signs of z occur.
PLACES = {
    torch.bfloat16: {
        "middle": (1.5, 0.3),
        "negative": (-1.5, 0.3),
        "binade border": (1.0, 0.3),
        "below a border": (2.0 - 2.0**-7, 0.7),
        "across a border": (2.0 - 2.0**-7, 1.4),
        "a thousandth of a step": (1.25, 0.001),
        # A change below 2^-126 would be a subnormal coefficient, which counts as zero.
        "subnormal": (2.0**-129, 150.3),
        "largest subnormal": (2.0**-126 - 2.0**-133, 128.4),
        "from zero": (0.0, 150.3),
    },
    torch.float16: {
        "middle": (1.5, 0.3),
        "negative": (-1.5, 0.3),
        "binade border": (1.0, 0.3),
        "across a border": (2.0 - 2.0**-10, 1.4),
        "a thousandth of a step": (1.25, 0.001),
        "subnormal": (2.0**-20, 0.3),
        "tiny change of a subnormal": (2.0**-15, 0.0001),
        "largest subnormal": (2.0**-14 - 2.0**-24, 0.7),
        "smallest normal": (2.0**-14, 0.3),
        "from zero": (0.0, 0.3),
    },
}
STEP = {torch.bfloat16: (7, -133), torch.float16: (10, -24)}


@pytest.mark.parametrize(
    ("dtype", "place"), [(dtype, place) for dtype in PLACES for place in PLACES[dtype]]
)
def test_the_mean_is_the_exact_value(server, dtype, place, full):
    """E[round(x)] = x, for a change up and a change down apart."""
    weight, share = PLACES[dtype][place]
    digits, lowest = STEP[dtype]
    exponent = math.frexp(abs(weight))[1] - 1 if weight else lowest
    step = 2.0 ** max(exponent - digits, lowest)
    count = 1 << 20 if full and server != "reference" else 1 << 16
    weights = torch.full((count,), weight, dtype=dtype)
    zk.add_noise_(zk.ParamTable({"w": weights}), 5, share * step, "rademacher", "stochastic")
    z = zk.noise(count, seed=5, stream=STREAM, distribution="rademacher")
    for sign in (1.0, -1.0):
        steps = (weights[z == sign].double() - weight) / step
        # A two-point distribution on neighbours a step apart; twice that above a binade border.
        low = math.floor(sign * share)
        spread = 2.0 * math.sqrt(max((sign * share - low) * (1 - sign * share + low), 1e-3))
        error = float(steps.mean()) - sign * share
        assert abs(error) < STANDARD_ERRORS * spread / math.sqrt(len(steps))
        assert bool(((steps - sign * share).abs() <= 2.0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_results_stay(server, dtype):
    """Where weight + change is on the grid, all but the dither's share of results hit it."""
    digits = STEP[dtype][0]
    step = 2.0**-digits
    weights = torch.full((1 << 16,), 1.5, dtype=dtype)
    z = zk.noise(1 << 16, seed=5, stream=STREAM, distribution="rademacher")
    zk.add_noise_(zk.ParamTable({"w": weights}), 5, step, "rademacher", "stochastic")
    missed = float((weights.double() != 1.5 + step * z.double()).double().mean())
    assert missed <= 2.0 * 2.0**-23 / step


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("distribution", zk.noise.DISTRIBUTIONS)
def test_updates_of_1e_7_of_the_weight_arrive(distribution, full):
    """Mean applied update over intended, many steps at lr * g = 1e-7 of the weight.

    All steps go along one direction, so that the intended update of an element is c z T after T
    steps of c = 1e-7 w. Rounding to one of two neighbours U apart adds a variance of |c z| U a
    step. Over N elements the ratio <applied, intended> / <intended, intended> then has the
    standard error sqrt(E|z|^3 U / (c N T)). With U = 2^-7 and weights of 1.75 to 2 (the top of a
    binade, where U is the smallest share of the weight) N T = 1.05e10 makes that 0.0020 for
    z = +-1, and 1.7e10 makes it 0.0020 for normals: the tolerance is five standard errors. Without
    --full a 16th of the elements does, within four times as much.
    """
    torch.set_num_threads(2)
    elements, wider = (1 << 20, 1) if full else (1 << 16, 4)
    steps = {"rademacher": 10_000, "rank1": 10_000, "gaussian": 16_000}[distribution]
    before = torch.linspace(1.75, 1.99, elements).bfloat16()
    change = float(1e-7 * before.double().mean())
    z = zk.noise(elements, seed=9, stream=STREAM, distribution=distribution).double()

    def applied_over_intended(rounding, steps):
        terms, rounds = ([9] * steps, [change] * steps), {"rounds": [1] * steps}
        call = (*terms, distribution, rounding, list(range(steps)))
        applied = changed({"w": before}, *call, **rounds)["w"].double() - before.double()
        return float((applied * z).sum() / (change * steps * (z * z).sum()))

    ratio = applied_over_intended("stochastic", steps)
    print(f"applied over intended: {ratio:.4f}")
    assert abs(ratio - 1) < wider * bound("applied over intended")
    assert applied_over_intended("nearest", 100) < bound("nearest loses")
