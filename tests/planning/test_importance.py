"""Importance of blocks from squared scalars: against the truth that the scalars were made from."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("scipy")

from zorba.planning import estimate_importance

from tests.conftest import Random

BLOCKS = 8
TRUTH = np.array([8.0, 4.0, 2.0, 1.0, 1.0, 0.5, 0.25, 0.125])


def measure(
    generator: np.random.Generator, masks: np.ndarray, rounds: int, samples: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of masks, energies and samples; g is normal of variance ``a . truth``."""
    rows = np.tile(masks, (rounds, 1))
    spread = np.sqrt(rows @ TRUTH)[:, None]
    scalars = spread * generator.standard_normal((len(rows), samples))
    return rows, np.square(scalars).mean(axis=1), np.full(len(rows), samples)


def random_masks(generator: np.random.Generator, clients: int) -> np.ndarray:
    """Rows with a third of the blocks, such that every block is in several."""
    while True:
        masks = generator.random((clients, BLOCKS)) < 1 / 3
        if masks.any(axis=1).all() and (masks.sum(axis=0) >= 2).all():
            return masks


def test_finds_what_the_scalars_were_made_from(rng: Random) -> None:
    generator = np.random.default_rng(rng.seed)
    found = estimate_importance(
        *measure(generator, random_masks(generator, 40), rounds=200, samples=10)
    )
    # 80,000 scalars: the largest blocks are known to some per cent, small ones to their order.
    np.testing.assert_allclose(found[:3], TRUTH[:3] / TRUTH.mean(), rtol=0.2)
    assert found.min() > 0
    assert found.mean() == pytest.approx(1)
    assert (found[:3].min()) > found[5:].max()


def test_scale_and_order_do_not_matter(rng: Random) -> None:
    generator = np.random.default_rng(rng.seed)
    masks, energies, samples = measure(generator, random_masks(generator, 12), 3, 5)
    found = estimate_importance(masks, energies, samples)
    np.testing.assert_allclose(estimate_importance(masks, 1e-12 * energies, samples), found)
    rows, columns = generator.permutation(len(masks)), generator.permutation(BLOCKS)
    turned = estimate_importance(masks[rows][:, columns], energies[rows], samples[rows])
    np.testing.assert_allclose(turned, found[columns], rtol=1e-6)


def test_masks_that_tell_nothing_leave_blocks_alike(rng: Random) -> None:
    generator = np.random.default_rng(rng.seed)
    same = np.ones((5, BLOCKS), dtype=bool)
    np.testing.assert_allclose(estimate_importance(*measure(generator, same, 20, 5)), 1, rtol=1e-6)
    # Blocks that are always together share what they have.
    halves = np.repeat([[True] * 4 + [False] * 4, [False] * 4 + [True] * 4], 3, axis=0)
    found = estimate_importance(*measure(generator, halves, 50, 5))
    np.testing.assert_allclose(found[:4], found[0], rtol=1e-6)
    np.testing.assert_allclose(found[4:], found[7], rtol=1e-6)
    assert found[0] > 3 * found[7]


def test_one_measurement_moves_little(rng: Random) -> None:
    generator = np.random.default_rng(rng.seed)
    mask = np.array([[True] * 3 + [False] * 5])
    found = estimate_importance(*measure(generator, mask, 1, 1))
    np.testing.assert_allclose(found, 1, atol=1e-9)  # one row sets the scale and tells no more


def test_nothing_measured_leaves_blocks_alike() -> None:
    masks = np.ones((3, BLOCKS), dtype=bool)
    assert (estimate_importance(masks, np.zeros(3), [4, 4, 4]) == 1).all()
    assert (estimate_importance(np.ones((0, BLOCKS)), [], []) == 1).all()


@pytest.mark.parametrize(
    ("masks", "energies", "samples", "floor", "message"),
    [
        ([[1, 1]], [1.0, 2.0], [1], 0.1, "a row"),
        ([1, 1], [1.0, 2.0], [1, 1], 0.1, "must be"),
        ([[1, 1]], [-1.0], [1], 0.1, "not negative"),
        ([[1, 1]], [np.nan], [1], 0.1, "finite"),
        ([[1, 1]], [1.0], [0], 0.1, "at least 1"),
        ([[0, 0]], [1.0], [1], 0.1, "active block"),
        ([[1, 1]], [1.0], [1], 0.0, "floor"),
    ],
)
def test_refuses(masks: object, energies: object, samples: object, floor: float, message: str):
    with pytest.raises(ValueError, match=message):
        estimate_importance(masks, energies, samples, floor)
