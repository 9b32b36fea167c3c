"""Aggregation against the formula, written out."""

from __future__ import annotations

import numpy as np
import pytest
from zorba.federated.aggregate import Measurement, aggregate
from zorba.federated.entry import UNCOVERED


def _measurements(count: int, blocks: int, seed: int = 0) -> dict[str, Measurement]:
    rng = np.random.default_rng(seed)
    return {
        f"client{n}": Measurement(
            rng.normal(size=(2, 3)).astype(np.float32),
            rng.random(blocks) < 0.5,
            int(rng.integers(1, 50)),
        )
        for n in range(count)
    }


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_equals_the_formula(weighting: str, clip: float | None) -> None:
    given = _measurements(6, 9)
    coefs, columns = aggregate(given, 0.1, weighting, clip)  # type: ignore[arg-type]
    for block in range(9):
        covering = [m for m in given.values() if m.mask[block]]
        if not covering:
            assert columns[block] == UNCOVERED
            continue
        total = sum(m.num_examples if weighting == "examples" else 1 for m in covering)
        mean = np.zeros((2, 3))
        for m in covering:
            g = m.scalars.astype(np.float64)
            g = g if clip is None else np.clip(g, -clip, clip)
            mean += g * (m.num_examples if weighting == "examples" else 1) / total
        # float64 sums of 6 terms, then one rounding to float32 (6e-8 relative)
        np.testing.assert_allclose(coefs[:, :, columns[block]], -0.1 * mean / 3, rtol=1e-6)


def test_blocks_of_the_same_coverage_share_a_column() -> None:
    given = {
        "a": Measurement(np.ones((1, 2), np.float32), np.array([1, 1, 0, 0, 1], bool), 1),
        "b": Measurement(np.ones((1, 2), np.float32), np.array([0, 1, 0, 0, 0], bool), 1),
    }
    coefs, columns = aggregate(given, 1.0)
    assert columns.tolist() == [0, 1, UNCOVERED, UNCOVERED, 0]
    assert coefs.shape == (1, 2, 2)


def test_order_of_arrival_does_not_matter() -> None:
    given = _measurements(40, 7)
    for name, value in (("client3", 3e38), ("client7", -3e38), ("client20", 1.0)):
        scalars = np.full((2, 3), value, np.float32)
        given[name] = Measurement(scalars, np.ones(7, bool), 1)  # sums that depend on their order
    backwards = dict(reversed(given.items()))
    for one, other in zip(aggregate(given, 0.3), aggregate(backwards, 0.3), strict=True):
        assert one.tobytes() == other.tobytes()


def test_one_client_keeps_its_scalars() -> None:
    (only,) = _measurements(1, 1).values()
    coefs, _ = aggregate({"a": Measurement(only.scalars, np.array([True]), 17)}, 0.5)
    expected = (-0.5 * only.scalars.astype(np.float64) / 3).astype(np.float32)
    assert coefs[:, :, 0].tobytes() == expected.tobytes()


def test_nobody_covers_anything() -> None:
    given = {"a": Measurement(np.ones((1, 2), np.float32), np.zeros(3, bool), 5)}
    coefs, columns = aggregate(given, 1.0)
    assert coefs.shape == (1, 2, 0)
    assert (columns == UNCOVERED).all()


def test_a_client_without_examples_covers_nothing() -> None:
    given = {
        "a": Measurement(np.ones((1, 2), np.float32), np.array([1, 1, 0], bool), 5),
        "b": Measurement(np.ones((1, 2), np.float32), np.array([0, 1, 1], bool), 0),
    }
    assert aggregate(given, 1.0)[1].tolist() == [0, 0, UNCOVERED]
