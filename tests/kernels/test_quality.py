"""How good the noise is: exactly over all 2^32 words, and by samples between words.

Seeds are frozen: each figure is a constant of the contract, so nothing here can flake.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import zorba_kernels as zk
from tests.tolerances import bound, sampling_error
from zorba_kernels.backends import reference

RADII = torch.arange(1 << 16)
ANGLES = torch.arange(1 << 15)


@pytest.fixture(scope="module")
def radius() -> Tensor:
    """r of every radius pattern, in the units of z: float64 [65536]."""
    first, second = reference._box_muller(RADII | 12345 << 16)
    return torch.hypot(first.double(), second.double())


@pytest.fixture(scope="module")
def direction(radius) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle pattern: float64 [32768] each."""
    first, second = reference._box_muller(777 | ANGLES << 16)
    return first.double() / radius[777], second.double() / radius[777]


def test_every_value_is_finite_and_separates(radius, direction):
    """z is radius times direction, to float32 rounding, for every pattern of either."""
    places = [(RADII, angle) for angle in (0, 1, 9999, 16383, 16384, 32767)]
    places += [(pattern, ANGLES) for pattern in (0, 1, 32767, 65534, 65535)]
    for pattern, angle in places:
        normals = reference._box_muller(pattern | angle << 16)
        assert bool((normals[0] > 0).all())
        for z, part in zip(normals, direction, strict=True):
            assert bool(torch.isfinite(z).all())
            wanted = radius[pattern] * part[angle]
            torch.testing.assert_close(z.double(), wanted, rtol=1e-4, atol=0.0)


def test_radius_and_angle_are_accurate(radius, direction):
    """Also that s is positive everywhere: its root would be nowhere near otherwise."""
    exact = torch.sqrt(-2 * torch.log((RADII.double() + 0.5) / 65536))
    assert float((radius - exact).abs().max()) < bound("radius")
    assert float(radius.min()) > 0
    turn = math.pi * ((ANGLES.double() + 0.5) / 32768 - 0.5)
    assert float((direction[0] - torch.cos(turn)).abs().max()) < bound("angle")
    assert float((direction[1] - torch.sin(turn)).abs().max()) < bound("angle")


def test_mean_is_zero():
    """A word and the same with bit 31 set give z and -z."""
    words = torch.cat([RADII | 4321 << 16, 4321 | ANGLES << 16])
    both = (reference._box_muller(some) for some in (words, words | 1 << 31))
    for z, other in zip(*both, strict=True):
        assert float((z + other).abs().max()) == bound("noise mean")


def test_moments_and_reach(radius, direction):
    for part in direction:
        variance = float((radius**2).mean() * (part**2).mean())
        kurtosis = float((radius**4).mean() * (part**4).mean()) / variance**2
        assert abs(variance - 1) < bound("noise variance")
        assert abs(kurtosis - 3) < bound("noise kurtosis")
        assert float(radius.max() * part.abs().max()) >= bound("noise reach")
    covariance = float((radius**2).mean() * (direction[0] * direction[1]).mean())
    assert abs(covariance) < 1e-12, "of cos and sin: they cancel angle by angle"


def test_kolmogorov_smirnov(radius, direction):
    """P(|z| <= t) over all words, at 1,500 t: at the quantiles of |z|, and denser in the tail."""
    normal = torch.distributions.Normal(torch.tensor(0.0).double(), torch.tensor(1.0).double())
    quantiles = normal.icdf(0.5 + 0.5 * (torch.arange(1000).double() + 0.5) / 1000)
    points = torch.cat([quantiles, torch.linspace(2.0, 4.9, 500).double()])
    ordered = radius.sort().values
    for part in direction:
        size = part.abs().sort().values[::2]  # each size occurs twice, for an angle and its mirror
        worst = 0.0
        for t in points.split(100):
            below = torch.searchsorted(ordered, t[:, None] / size, right=True)
            share = below.double().mean(dim=1) / len(ordered)
            # For a symmetric distribution the distance of z is half that of |z|.
            worst = max(worst, float((share - (2 * normal.cdf(t) - 1)).abs().max()) / 2)
        assert worst < bound("noise KS")


# --- Between words -------------------------------------------------------------------------------


def correlation(a: Tensor, b: Tensor) -> float:
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float((a * b).mean() / (a.std() * b.std()))


@pytest.fixture(scope="module")
def count(full: bool) -> int:
    """Values of a sample: the bounds follow from how many there are."""
    return 1 << 21 if full else 1 << 18


@pytest.fixture(scope="module", params=zk.noise.DISTRIBUTIONS)
def sample(request: pytest.FixtureRequest, count: int) -> Tensor:
    return zk.noise(count, seed=1, stream=2, distribution=request.param)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 8, 9, 31, 32, 33, 64, 127, 128, 129, 512, 2048])
def test_neighbours(sample, count, lag):
    assert abs(correlation(sample[lag:], sample[:-lag])) < sampling_error(count - lag)


def test_two_normals_of_a_word_share_no_size(count):
    """They share a radius: of true normals not even the squares are correlated."""
    z = zk.noise(count, seed=1, stream=2)
    for a, b in ((z[::2], z[1::2]), (z[:-2:2], z[2::2])):
        assert abs(correlation(a * a, b * b)) < sampling_error(len(a))
        assert abs(correlation(a * a * a, b)) < sampling_error(len(a))


OTHER = [
    *({"seed": 2}, {"seed": 1 + (1 << 32)}, {"seed": 1 + (1 << 63)}, {"seed": 2, "stream": 1}),
    *({"stream": 3}, {"stream": 2 + (1 << 32)}, {"stream": 2 + (1 << 63)}),
    *({"sample": 1}, {"sample": 1 << 30}, {"offset": 1 << 34}),
]


@pytest.mark.parametrize("other", OTHER, ids=str)
@pytest.mark.parametrize("kind", zk.noise.DISTRIBUTIONS)
def test_neighbouring_keys(kind, other, count):
    key = {"seed": 1, "stream": 2, "sample": 0, "distribution": kind}
    a, b = zk.noise(count, **key), zk.noise(count, **(key | other))
    assert abs(correlation(a, b)) < sampling_error(count)


def test_balance(sample, count):
    assert abs(float(sample.double().mean())) < sampling_error(count)
    assert abs(float(sample.double().pow(2).mean()) - 1) < math.sqrt(2) * sampling_error(count)


def test_rademacher_is_plus_or_minus_one(count):
    z = zk.noise(count, seed=1, stream=2, distribution="rademacher")
    assert bool((z.abs() == 1).all())
    for bit in range(32):  # each bit of a word is balanced by itself
        assert abs(float(z[bit::32].mean())) < sampling_error(count // 32)


def test_rounding_bits_are_uniform_and_apart():
    """16 bits of each element: balanced one by one, and uncorrelated with those of neighbours."""
    index = torch.arange(1 << 19)
    random16, dither = reference._rounding_at(index, 2, 1)
    for bit in range(16):
        ones = (random16 >> bit & 1).double() * 2 - 1
        assert abs(float(ones.mean())) < sampling_error(len(index))
    scaled = random16.double()
    for lag in (8, 9, 256, 512):
        assert abs(correlation(scaled[lag:], scaled[:-lag])) < sampling_error(len(index) - lag)
    # Next to each other the low byte of one is the high byte of the other: 2^-8, as designed.
    same_word = (index % 4 < 3)[:-1]
    close = correlation(scaled[1:][same_word], scaled[:-1][same_word])
    assert abs(close - 1 / 256) < sampling_error(int(same_word.sum()))
    blocks = dither[::8].double()
    assert abs(correlation(blocks[1:], blocks[:-1])) < sampling_error(len(blocks) - 1)
    for element in range(8):
        assert abs(correlation(scaled[element::8], blocks)) < sampling_error(len(blocks))
    assert float(dither.abs().max()) <= 2.0**-23
