"""Aggregation against the formula, written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from zorba.federated.aggregate import aggregate

RULES = ("mean", "median", "trimmed")


def measured(numbers: np.random.Generator, clients: int, blocks: int) -> tuple[Any, Any, Any]:
    """Scalars, masks and examples; K = 2, P = 3, about half of the clients cover a block."""
    return (
        numbers.normal(size=(clients, 2, 3)).astype(np.float32),
        numbers.random((clients, blocks)) < 0.5,
        numbers.integers(1, 50, clients),
    )


def one_block(*scalars: float) -> tuple[Any, Any]:
    return np.array(scalars, np.float32).reshape(-1, 1, 1), np.ones((len(scalars), 1), bool)


def of_copies(rule: str, copies: Any, trim: float) -> Any:
    """The rule on the list that has each client's scalar as often as the client weighs."""
    ranked = np.sort(copies, axis=0)
    if rule == "median":
        return np.median(ranked, axis=0)
    cut = int(np.ceil(trim * len(ranked))) if rule == "trimmed" else 0
    cut = min(cut, (len(ranked) - 1) // 2)
    return ranked[cut : len(ranked) - cut].mean(axis=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_equals_the_rule_on_copies(
    numbers: np.random.Generator, rule: Any, weighting: Any, clip: float | None
) -> None:
    scalars, masks, examples = measured(numbers, 9, 12)
    trim = float(numbers.uniform(0, 0.5))
    coefs = aggregate(scalars, masks, examples, 0.1, weighting, clip, rule, trim)
    for block in range(12):
        covering = masks[:, block]
        if not covering.any():
            assert not coefs[block].any()
            continue
        g = scalars[covering].astype(np.float64)
        g = g if clip is None else np.clip(g, -clip, clip)
        counts = examples[covering] if weighting == "examples" else 1
        expected = -0.1 * of_copies(rule, np.repeat(g, counts, axis=0), trim) / 3
        # float64 sums of up to 450 terms, then one rounding to float32 (6e-8 relative). Sums that
        # cancel keep the error of their terms, which are below 6.
        np.testing.assert_allclose(coefs[block], expected, rtol=1e-6, atol=1e-14)


def folded(terms: list[float]) -> float:
    """In plain Python: any machine whose doubles are IEEE's makes these bits."""
    while len(terms) > 1:
        half = (len(terms) + 1) // 2
        rest = terms[half:]
        terms = [a + b for a, b in zip(terms, rest, strict=False)] + terms[len(rest) : half]
    return terms[0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("values", [None, [-1, 0, 1, 2], [-0.0, 0.0], [-1, -0.0]], ids=str)
def test_sums_have_the_order_that_is_documented(
    numbers: np.random.Generator, rule: Any, values: list[float] | None
) -> None:
    """Half is added on to half; who is left out adds a zero; equal scalars stand by client."""
    for clients in (1, 2, 3, 8, 41):
        g, masks, examples = measured(numbers, clients, 9)
        if values is not None:
            g = numbers.choice(np.array(values, np.float32), g.shape)
        trim = float(numbers.uniform(0, 0.5))
        coefs = aggregate(g, masks, examples, 1.0, "examples", 1.5, rule, trim)
        for block, k, p in np.argwhere(np.ones((9, 2, 3))):
            rows = np.flatnonzero(masks[:, block])
            if not len(rows):
                continue
            if rule != "mean":
                rows = sorted(rows, key=lambda n: (g[n, k, p], not np.signbit(g[n, k, p]), n))
            total = int(examples[rows].sum())
            share = {"mean": 0.0, "median": 0.5, "trimmed": trim}[rule]
            cut = min(int(np.ceil(share * total)), (total - 1) // 2)
            terms, before = [], 0
            for n in rows:
                after = before + int(examples[n])
                kept = max(min(after, total - cut) - max(before, cut), 0)
                terms.append(float(np.clip(np.float64(g[n, k, p]), -1.5, 1.5)) * kept)
                before = after
            expected = np.float32(-(folded(terms) / (total - 2 * cut)) / 3)
            assert coefs[block, k, p].tobytes() == expected.tobytes()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("scalars", "masks", "examples", "expected"),
    [
        ([1.0], [[0, 0, 0]], [5], [0.0, 0.0, 0.0]),
        ([1.0, 50.0], [[1, 1, 0], [0, 1, 1]], [5, 0], [-1.0, -1.0, 0.0]),
        ([1.0, 3.0], [[1, 1, 0, 1], [0, 1, 0, 0]], [1, 1], [-1.0, -2.0, 0.0, -1.0]),
    ],
    ids=["nobody covers", "no examples, no cover", "by block"],
)
def test_each_block_has_the_clients_that_covered_it(
    rule: Any, scalars: Any, masks: Any, examples: Any, expected: list[float]
) -> None:
    g = np.array(scalars, np.float32).reshape(-1, 1, 1)
    coefs = aggregate(g, np.array(masks, bool), np.array(examples), 1.0, aggregation=rule)
    assert coefs.reshape(-1).tolist() == expected


@pytest.mark.parametrize("rule", ["median", "trimmed"])
@pytest.mark.parametrize("lie", [3.4e38, 1e30, -1e30, 50.0])
def test_liars_below_the_share_move_nothing_out_of_the_others_range(
    numbers: np.random.Generator, rule: Any, lie: float
) -> None:
    honest = numbers.normal(size=6)
    given = np.append(honest, [lie, lie])[numbers.permutation(8)]
    scalars, masks = one_block(*given)
    coefs = aggregate(scalars, masks, np.ones(8, int), 1.0, "uniform", None, rule, 0.25)
    assert honest.min() <= -coefs.item() <= honest.max()
    mean = aggregate(scalars, masks, np.ones(8, int), 1.0, "uniform")
    assert not honest.min() <= -mean.item() <= honest.max()


def test_as_many_are_cut_as_the_share_asks_for_and_no_fewer() -> None:
    scalars, masks = one_block(*range(100))
    for trim in (0.07, 0.29, 0.291):  # 0.29 * 100 is a little below 29 in doubles
        kept = range(int(np.ceil(trim * 100)), 100 - int(np.ceil(trim * 100)))
        coefs = aggregate(scalars, masks, np.ones(100, int), 1.0, "uniform", None, "trimmed", trim)
        assert -coefs.item() == pytest.approx(np.mean(kept))
    huge = np.where(np.arange(100) >= 71, 3e38, 1.0)
    coefs = aggregate(*one_block(*huge), np.ones(100, int), 1.0, "uniform", None, "trimmed", 0.29)
    assert coefs.item() == -1.0, "not a trace of what was cut"
