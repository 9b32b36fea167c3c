"""Private scalars: sensitivity, noise, what is counted, and that asking twice is in vain."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from dp_accounting import get_epsilon_gaussian
from zorba.federated import FederationError, MessageError, Privacy, PrivacyAccountant, PrivacySpent
from zorba.optim import one_by_one

from tests.federated.test_messages import make_reply
from tests.federated.world import World, plan_of, reply_of, spy

POLICY = Privacy("client", clip=0.5, noise_multiplier=2.0, delta=1e-5)
EXAMPLE = replace(POLICY, unit="example")


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / "ledger.json"


def epsilon(path: Path | None = None, further: int = 0) -> float:
    return PrivacyAccountant(POLICY, path).spent(further).epsilon


def quiet(accountant: PrivacyAccountant) -> PrivacyAccountant:
    """One whose noise is zero, to look at what it is added to."""
    accountant._gaussian = lambda: 0.0  # type: ignore[method-assign]
    return accountant


def make_private(world: World, name: str, accountant: PrivacyAccountant) -> PrivacyAccountant:
    client = world.clients[name]
    client.privacy, client._last = accountant, accountant.last
    return accountant


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("unit", "user"),
        *(("clip", v) for v in (0.0, math.inf)),
        *(("noise_multiplier", v) for v in (0.0, math.nan)),
        *(("delta", v) for v in (0.0, 1.0)),
        ("max_epsilon", 0.0),
    ],
)
def test_bad_policy_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        replace(POLICY, **{name: value})


def test_replacing_an_example_moves_the_mean_no_further_than_the_noise_is_scaled_to(
    numbers: np.random.Generator,
) -> None:
    """For any replacement, those without a finite loss among them."""
    accountant = quiet(PrivacyAccountant(EXAMPLE))
    samples, examples, far = 4, 7, 0.0
    for size in (1e-3, 1.0, 1e30, 1e300, math.inf, math.nan):
        one = numbers.normal(size=(samples, examples))
        other = one.copy()
        other[:, 3] = numbers.normal(size=samples) * size
        moved = accountant.release(list(one), examples) - accountant.release(list(other), examples)
        far = max(far, float(np.linalg.norm(moved)))
    limit = 2 * EXAMPLE.clip / examples
    assert far <= limit * (1 + 1e-6)  # scalars are rounded to float32
    same = np.repeat(one[:, :1], examples, axis=1)
    ends = [accountant.release(list(rows), examples) for rows in (same, -same)]
    assert np.linalg.norm(ends[0] - ends[1]) > limit, "the bound is on one example, not on all"


@pytest.mark.parametrize("examples", [12, 11, 3])
def test_an_example_of_a_part_moves_one_scalar_within_the_noise(
    numbers: np.random.Generator, examples: int
) -> None:
    """Own directions: each of 4 parts of a batch has a scalar, P / n times the sum of its part."""
    accountant, parts, far = quiet(PrivacyAccountant(EXAMPLE)), 4, 0.0
    for size in (1e-3, 1.0, 1e30, math.inf, math.nan):
        one = numbers.normal(size=examples) * 1e-3
        other = one.copy()
        other[2] = numbers.normal() * size
        moved = accountant.release([one], examples, parts) - accountant.release(
            [other], examples, parts
        )
        assert np.count_nonzero(moved) == 1
        far = max(far, float(np.abs(moved).max()))
    assert far <= 2 * EXAMPLE.clip * parts / examples * (1 + 1e-6)
    told = accountant.release([one], examples, parts)
    each = -(-examples // parts)
    expected = [one[p * each : (p + 1) * each].sum() * parts / examples for p in range(parts)]
    np.testing.assert_allclose(told, expected, rtol=1e-5, atol=1e-12)
    assert told.mean() == pytest.approx(one.mean(), rel=1e-5, abs=1e-9)


def test_noise_of_parts_has_the_scale_that_is_counted() -> None:
    """As below; each part of 5 of the 20 examples has a mean of its own."""
    accountant = PrivacyAccountant(EXAMPLE)
    told = np.concatenate([accountant.release([np.zeros(20)], 20, 4) for _ in range(5_000)])
    scale = EXAMPLE.noise_multiplier * 2 * EXAMPLE.clip / 5
    assert abs(told.mean() / scale) < 6 / 141
    assert abs(told.std() / scale - 1) < 6 / 200


@pytest.mark.parametrize("policy", [POLICY, EXAMPLE], ids=["client", "example"])
def test_small_differences_are_only_averaged(numbers: np.random.Generator, policy: Privacy) -> None:
    rows = numbers.normal(size=(3, 8)) * 1e-3
    told = quiet(PrivacyAccountant(policy)).release(list(rows), 8)
    assert told.dtype == np.float32
    np.testing.assert_allclose(told, rows.mean(axis=1), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("policy", "rows"), [(POLICY, 1), (EXAMPLE, 5)], ids=["client", "example"])
def test_noise_has_the_scale_that_is_counted(policy: Privacy, rows: int) -> None:
    """Standard errors of 20,000 draws: 1/141 for the mean, 1/200 for the deviation; 6 of each."""
    told = PrivacyAccountant(policy).release([np.zeros(5)] * 20_000, 5)
    scale = policy.noise_multiplier * 2 * policy.clip / rows
    assert abs(told.mean() / scale) < 6 / 141
    assert abs(told.std() / scale - 1) < 6 / 200


def test_noise_does_not_come_from_seeds() -> None:
    told = []
    for _ in range(2):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        told.append(PrivacyAccountant(POLICY).release([0.0] * 4, 1).tolist())
    assert told[0] != told[1]


def test_privacy_of_examples_needs_their_losses(world: World) -> None:
    accountant = make_private(world, "ada", PrivacyAccountant(EXAMPLE))
    with pytest.raises(FederationError, match="needs the loss of each of 10 examples"):
        world.clients["ada"].handle(world.plan("ada"))
    assert accountant.spent().epsilon == 0, "nothing was told"


def test_epsilon_is_an_upper_bound_and_close_to_the_exact_one() -> None:
    """Steps of one Gaussian each are together one Gaussian of 1 / sqrt(steps) the noise."""
    for steps in (1, 10, 500):
        exact = get_epsilon_gaussian(POLICY.noise_multiplier / math.sqrt(steps), POLICY.delta)
        assert exact <= epsilon(further=steps) <= 1.15 * exact
    assert epsilon() == 0.0


def test_earlier_noise_still_counts(ledger: Path) -> None:
    first = PrivacyAccountant(replace(POLICY, noise_multiplier=1.0), ledger)
    first.note(3, b"asked", b"answered")
    later = PrivacyAccountant(replace(POLICY, noise_multiplier=50.0), ledger)
    assert later.spent().epsilon == first.spent().epsilon
    assert later.last == (b"asked", b"answered")
    with pytest.raises(FederationError, match="keep the unit"):
        PrivacyAccountant(EXAMPLE, ledger)
    ledger.write_text(ledger.read_text()[:-20])
    with pytest.raises(FederationError, match="no privacy ledger"):
        PrivacyAccountant(POLICY, ledger)


def test_a_run_tells_what_every_client_spent(make_world: Any, tmp_path: Path) -> None:
    world = make_world(local_steps=2)
    for name in ("ada", "bob"):
        make_private(world, name, PrivacyAccountant(POLICY, tmp_path / name))
    result = world.run(5)
    assert result.replicas_identical
    spent = PrivacySpent("client", epsilon(further=10), POLICY.delta)  # 5 rounds of 2 local steps
    assert result.privacy == {"ada": spent, "bob": spent}
    report = result.reports[-1]
    assert math.isnan(report.losses["ada"])
    assert report.loss == pytest.approx(report.losses["cleo"]), "of those who tell it"


def test_a_spent_budget_ends_the_client_and_not_the_run(world: World) -> None:
    budget = epsilon(further=2)
    make_private(world, "ada", PrivacyAccountant(replace(POLICY, max_epsilon=budget)))
    result = world.run(4)
    assert ["ada" in report.clients for report in result.reports] == [True, True, False, False]
    assert "the privacy budget is spent" in result.reports[2].failures["ada"]
    assert result.replicas_identical, "it still follows the log"
    assert result.privacy["ada"].epsilon == pytest.approx(budget)


def test_a_plan_without_seeds_spends_nothing(world: World) -> None:
    accountant = make_private(world, "ada", PrivacyAccountant(POLICY))
    world.greet()
    data = world.server.begin_round(measures=False)["ada"]
    assert reply_of(world.clients["ada"].handle(data)).privacy == accountant.spent()
    assert accountant.spent().epsilon == 0


def test_the_same_question_has_one_answer_also_after_a_restart(world: World, ledger: Path) -> None:
    client = world.clients["ada"]
    make_private(world, "ada", PrivacyAccountant(POLICY, ledger))
    assert world.answer("ada", world.plan("ada")).accepted
    world.server.end_round()
    plan = plan_of(world.server.begin_round()["ada"])
    assert len(plan.entries) == 1
    answer = client.handle(plan.encode())
    spent = epsilon(ledger)
    assert client.handle(plan.encode()) == answer

    make_private(world, "ada", PrivacyAccountant(POLICY, ledger))  # nothing is left but the file
    assert client.handle(plan.encode()) == answer
    again = replace(plan, base_round=1, num_entries=0, frames=b"")
    assert client.handle(again.encode()) == answer, "other entries ask nothing new"
    assert epsilon(ledger) == spent

    other = reply_of(client.handle(replace(plan, eps=plan.eps * 2).encode()))
    assert other.scalars.tolist() != reply_of(answer).scalars.tolist()
    assert epsilon(ledger) > spent, "another question is counted"


def test_nothing_leaves_before_it_is_counted(world: World, ledger: Path) -> None:
    accountant = make_private(world, "ada", PrivacyAccountant(POLICY, ledger))
    data = world.plan("ada")
    full = patch("zorba.federated.privacy.write_whole", side_effect=OSError(28, "No space left"))
    with full, pytest.raises(OSError, match="No space left"):
        world.clients["ada"].handle(data)
    assert accountant.spent().epsilon > 0, "counted, though it was not told"
    world.clients["ada"].handle(data)
    assert accountant.spent().epsilon == epsilon(further=2)


def test_later_local_steps_see_only_the_private_scalars(make_world: Any) -> None:
    """The second step rides on the first's scalars, which nobody else ever sees unprivate."""
    world = make_world(local_steps=2, num_perturbations=2, lr=0.1)
    make_private(world, "ada", PrivacyAccountant(POLICY))
    world.clients["ada"].objective = lambda r, k: (one_by_one(lambda terms: 0.0), 10)
    seen = spy(world.clients["ada"])
    first = reply_of(world.clients["ada"].handle(world.plan("ada"))).scalars[0].astype(np.float64)
    assert (first != 0).all(), "the losses are equal, so this is noise"
    pending = seen[-1].coefs[0, :2].numpy()  # of block 0, which ada has active
    assert pending.tolist() == (-0.1 * first / 2).astype(np.float32).tolist()


@pytest.mark.parametrize(
    ("spent", "delta", "loss", "told"),
    [
        *((spent, 1e-5, math.nan, "tells no privacy") for spent in (math.nan, math.inf, -1.0)),
        (1.0, 0.0, math.nan, "tells no privacy"),
        (1.0, 1e-5, 0.5, "tells a loss"),
    ],
)
def test_privacy_that_is_none_is_refused(
    spent: float, delta: float, loss: float, told: str
) -> None:
    with pytest.raises(MessageError, match=told):
        replace(make_reply(), loss=loss, privacy=PrivacySpent("client", spent, delta))
