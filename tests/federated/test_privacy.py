"""Private scalars: sensitivity, noise, what is counted, and that asking twice is in vain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting import get_epsilon_gaussian
from zorba.federated import (
    FederationError,
    MessageError,
    Privacy,
    PrivacyAccountant,
    PrivacySpent,
    Reply,
    decode,
    run_federation,
)
from zorba.optim import NoiseTerms

from tests.conftest import Random
from tests.federated.test_client import plan_of, reply_of
from tests.federated.test_messages import make_reply
from tests.federated.world import World, make_settings

POLICY = Privacy("client", clip=0.5, noise_multiplier=2.0, delta=1e-5)
EXAMPLE = replace(POLICY, unit="example")


@pytest.fixture
def numbers(rng: Random) -> np.random.Generator:
    """numpy's generator, from the test's seed."""
    return np.random.default_rng(rng.seed)


def quiet(accountant: PrivacyAccountant) -> PrivacyAccountant:
    """One whose noise is zero, to look at what it is added to."""
    accountant._gaussian = lambda: 0.0  # type: ignore[method-assign]
    return accountant


def make_private(world: World, name: str, accountant: PrivacyAccountant) -> None:
    """Has a client of the world keep its scalars private."""
    client = world.clients[name]
    client.privacy, client._last = accountant, accountant.last


@pytest.mark.parametrize(
    "change",
    [
        {"unit": "user"},
        {"clip": 0.0},
        {"clip": math.inf},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": math.nan},
        {"delta": 0.0},
        {"delta": 1.0},
        {"max_epsilon": 0.0},
    ],
    ids=str,
)
def test_bad_policy_is_named(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=name):
        replace(POLICY, **change)


# --- Sensitivity and noise -----------------------------------------------------------------------


def test_replacing_an_example_moves_the_mean_no_further_than_the_noise_is_scaled_to(
    numbers: np.random.Generator,
) -> None:
    """For any replacement, those without a finite loss among them."""
    accountant = quiet(PrivacyAccountant(EXAMPLE))
    samples, examples = 4, 7
    far = 0.0
    for size in (1e-3, 1.0, 1e30, 1e300, math.inf, math.nan):
        one = numbers.normal(size=(samples, examples))
        other = one.copy()
        other[:, 3] = numbers.normal(size=samples) * size
        moved = accountant.release(list(one), examples) - accountant.release(list(other), examples)
        far = max(far, float(np.linalg.norm(moved)))
    limit = 2 * EXAMPLE.clip / examples
    assert far <= limit * (1 + 1e-6)  # scalars are rounded to float32
    opposite = [one, -one]
    ends = [
        accountant.release([*(np.full(examples, x) for x in row.T[0])], examples)
        for row in opposite
    ]
    assert np.linalg.norm(ends[0] - ends[1]) > limit, "the bound is on one example, not on all"


def test_small_differences_are_only_averaged(numbers: np.random.Generator) -> None:
    rows = numbers.normal(size=(3, 8)) * 1e-3
    expected = rows.mean(axis=1)
    for accountant in map(PrivacyAccountant, (POLICY, EXAMPLE)):
        told = quiet(accountant).release(list(rows), 8)
        assert told.dtype == np.float32
        np.testing.assert_allclose(told, expected, rtol=1e-6, atol=1e-12)


def test_noise_has_the_scale_that_is_counted() -> None:
    """Standard errors of 20,000 draws: 1/141 for the mean, 1/200 for the deviation; 6 of each."""
    count, examples = 20_000, 5
    for policy, rows in ((POLICY, 1), (EXAMPLE, examples)):
        told = PrivacyAccountant(policy).release([np.zeros(examples)] * count, examples)
        scale = policy.noise_multiplier * 2 * policy.clip / rows
        assert abs(told.mean() / scale) < 6 / 141
        assert abs(told.std() / scale - 1) < 6 / 200


def test_noise_does_not_come_from_seeds(world: World) -> None:
    """Not from the plan's, nor from those of numpy, torch and random."""
    import random

    import torch

    told = []
    for _ in range(2):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        told.append(PrivacyAccountant(POLICY).release([0.0] * 4, 1).tolist())
    assert told[0] != told[1]


def test_privacy_of_examples_needs_their_losses(world: World) -> None:
    make_private(world, "ada", PrivacyAccountant(EXAMPLE))
    with pytest.raises(FederationError, match="needs the loss of each of 10 examples"):
        world.clients["ada"].handle(world.plan("ada"))
    assert world.clients["ada"].privacy is not None
    assert world.clients["ada"].privacy.spent().epsilon == 0, "nothing was told"


# --- What is counted -----------------------------------------------------------------------------


def test_epsilon_is_an_upper_bound_and_close_to_the_exact_one() -> None:
    """Steps of one Gaussian each are together one Gaussian of 1 / sqrt(steps) the noise."""
    accountant = PrivacyAccountant(POLICY)
    for steps in (1, 10, 500):
        exact = get_epsilon_gaussian(POLICY.noise_multiplier / math.sqrt(steps), POLICY.delta)
        told = accountant.spent(steps).epsilon
        assert exact <= told <= 1.15 * exact
    assert accountant.spent().epsilon == 0.0


def test_earlier_noise_still_counts(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    first = PrivacyAccountant(replace(POLICY, noise_multiplier=1.0), path)
    first.note(3, b"asked", b"answered")
    later = PrivacyAccountant(replace(POLICY, noise_multiplier=50.0), path)
    assert later.spent().epsilon == first.spent().epsilon
    assert later.last == (b"asked", b"answered")
    with pytest.raises(FederationError, match="keep the unit"):
        PrivacyAccountant(EXAMPLE, path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(FederationError, match="no privacy ledger"):
        PrivacyAccountant(POLICY, path)


def test_a_run_tells_what_every_client_spent(tmp_path: Path) -> None:
    world = World(tmp_path / "log", make_settings(local_steps=2))
    for name in ("ada", "bob"):
        make_private(world, name, PrivacyAccountant(POLICY, tmp_path / name))
    result = run_federation(world.server, world.transport, 5)
    world.server.close()
    assert result.replicas_identical
    assert result.privacy.keys() == {"ada", "bob"}
    exact = PrivacyAccountant(POLICY).spent(10)  # 5 rounds of 2 local steps
    for told in result.privacy.values():
        assert told.unit == "client"
        assert (told.epsilon, told.delta) == pytest.approx((exact.epsilon, exact.delta))
    report = result.reports[-1]
    assert math.isnan(report.losses["ada"])
    assert report.loss == pytest.approx(report.losses["cleo"]), "of those who tell it"


def test_a_spent_budget_ends_the_client_and_not_the_run(tmp_path: Path) -> None:
    world = World(tmp_path / "log")
    budget = PrivacyAccountant(POLICY).spent(2).epsilon
    make_private(world, "ada", PrivacyAccountant(replace(POLICY, max_epsilon=budget)))
    result = run_federation(world.server, world.transport, 4)
    world.server.close()
    told = [("ada" in report.clients, report.failures) for report in result.reports]
    assert [measured for measured, _ in told] == [True, True, False, False]
    assert "the privacy budget is spent" in told[2][1]["ada"]
    assert result.replicas_identical, "it still follows the log"
    assert result.privacy["ada"].epsilon == pytest.approx(budget)


# --- Asking twice --------------------------------------------------------------------------------


def test_the_same_question_has_one_answer_also_after_a_restart(tmp_path: Path) -> None:
    world = World(tmp_path / "log")
    path = tmp_path / "ledger.json"
    make_private(world, "ada", PrivacyAccountant(POLICY, path))
    assert world.server.receive("ada", world.clients["ada"].handle(world.plan("ada"))).accepted
    world.server.end_round()
    data = world.server.begin_round()["ada"]
    assert len(plan_of(data).entries) == 1
    answer = world.clients["ada"].handle(data)
    spent = PrivacyAccountant(POLICY, path).spent().epsilon
    assert world.clients["ada"].handle(data) == answer

    make_private(world, "ada", PrivacyAccountant(POLICY, path))  # nothing is left but the file
    assert world.clients["ada"].handle(data) == answer
    again = replace(plan_of(data), base_round=1, num_entries=0, frames=b"")
    assert world.clients["ada"].handle(again.encode()) == answer, "other entries ask nothing new"
    assert PrivacyAccountant(POLICY, path).spent().epsilon == spent

    other = replace(plan_of(data), eps=plan_of(data).eps * 2).encode()
    assert reply_of(world.clients["ada"].handle(other)).scalars.tolist() != (
        reply_of(answer).scalars.tolist()
    )
    assert PrivacyAccountant(POLICY, path).spent().epsilon > spent, "another question is counted"
    world.server.close()


def test_nothing_leaves_before_it_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path / "log")
    accountant = PrivacyAccountant(POLICY, tmp_path / "ledger.json")
    make_private(world, "ada", accountant)
    data = world.plan("ada")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("zorba.federated.privacy.write_whole", full)
        with pytest.raises(OSError, match="No space left"):
            world.clients["ada"].handle(data)
    assert accountant.spent().epsilon > 0, "counted, though it was not told"
    world.clients["ada"].handle(data)
    assert accountant.spent().epsilon == PrivacyAccountant(POLICY).spent(2).epsilon
    world.server.close()


def test_later_local_steps_see_only_the_private_scalars(tmp_path: Path) -> None:
    """The second step rides on the first's scalars, which nobody else ever sees unprivate."""
    world = World(tmp_path / "log", make_settings(local_steps=2, num_perturbations=2, lr=0.1))
    make_private(world, "ada", PrivacyAccountant(POLICY))
    seen: list[list[NoiseTerms]] = []

    def objective(round_number: int, step: int) -> Any:
        def evaluate(noises: Sequence[NoiseTerms]) -> list[float]:
            seen.append(list(noises))
            return [0.0] * len(noises)

        return evaluate, 10

    world.clients["ada"].objective = objective
    data = world.plan("ada")
    first = reply_of(world.clients["ada"].handle(data)).scalars[0].astype(np.float64)
    assert (first != 0).all(), "the losses are equal, so this is noise"
    pending = seen[1][0].coefs[0, :2].numpy()  # of block 0, which ada has active
    assert pending.tolist() == (-0.1 * first / 2).astype(np.float32).tolist()
    world.server.close()


# --- Messages ------------------------------------------------------------------------------------


def test_privacy_comes_back_as_it_went() -> None:
    for unit in ("example", "client"):
        spent = PrivacySpent(unit, 2.5, 2.0**-17)  # exact in float32
        reply = replace(make_reply(), loss=math.nan, privacy=spent)
        back = decode(reply.encode())
        assert isinstance(back, Reply)
        assert back.privacy == spent
        assert back.encode() == reply.encode()


@pytest.mark.parametrize(
    "privacy",
    [
        PrivacySpent("client", math.nan, 1e-5),
        PrivacySpent("client", math.inf, 1e-5),
        PrivacySpent("client", -1.0, 1e-5),
        PrivacySpent("client", 1.0, 0.0),
    ],
)
def test_privacy_that_is_none_is_refused(privacy: PrivacySpent) -> None:
    with pytest.raises(MessageError, match="tells no privacy"):
        replace(make_reply(), loss=math.nan, privacy=privacy)
    with pytest.raises(MessageError, match="tells a loss"):
        replace(make_reply(), privacy=PrivacySpent("client", 1.0, 1e-5))


def test_a_plan_without_seeds_spends_nothing(world: World) -> None:
    accountant = PrivacyAccountant(POLICY)
    make_private(world, "ada", accountant)
    world.greet()
    data = world.server.final_plan()["ada"]
    assert reply_of(world.clients["ada"].handle(data)).privacy == accountant.spent()
    assert accountant.spent().epsilon == 0
