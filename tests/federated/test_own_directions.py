"""Own directions: each client measures samples that no other one does, and all are applied."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from zorba.federated import (
    Client,
    FederationError,
    ModelObjective,
    Privacy,
    PrivacyAccountant,
    Replica,
    Server,
    model_fingerprint,
)
from zorba.federated.aggregate import aggregate, aggregate_own
from zorba.optim import active_table
from zorba.optim.terms import RowTerms

import zorba_kernels as zk
from tests.federated.world import (
    NAMES,
    World,
    copy_table,
    loss_of,
    make_settings,
    plan_of,
    reply_of,
    spy,
)
from tests.tolerances import bound


@pytest.fixture
def own_world(make_world: Any) -> World:
    return make_world(directions="own")


def test_plans_hand_out_samples_that_do_not_overlap(own_world: World, make_world: Any) -> None:
    plans = {name: plan_of(own_world.plan(name)) for name in NAMES}
    assert len({plan.seeds for plan in plans.values()}) == 1
    assert [plan.first_sample for plan in plans.values()] == [0, 3, 6]
    again = {name: plan_of(make_world(directions="own").plan(name)) for name in NAMES}
    assert again == plans, "a server that starts again asks the same"
    shared = [plan_of(make_world(directions="shared").plan(name)) for name in NAMES]
    assert {plan.first_sample for plan in shared} == {0}


@pytest.mark.parametrize(
    ("changes", "clients", "expected"),
    [
        ({}, 3, "own"),
        ({}, 64, "own"),
        ({}, 65, "shared"),
        ({"own_up_to": 2}, 3, "shared"),
        ({"clients_per_round": 10}, 10_000, "own"),
        ({"aggregation": "median"}, 3, "shared"),
        ({"directions": "own"}, 65, "own"),
        ({"directions": "shared"}, 1, "shared"),
    ],
)
def test_default_is_own_for_few(changes: Any, clients: int, expected: str) -> None:
    assert make_settings(**changes).directions_of(clients) == expected


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"directions": "own", "aggregation": "median"}, "compares clients along the same"),
        ({"directions": "mine"}, "directions is 'mine'"),
        ({"own_up_to": 0}, "own_up_to"),
        ({"part_bound": 0.5}, "part_bound must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make_settings(**changes)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_coefficients_are_the_formula(numbers: np.random.Generator, weighting: Any) -> None:
    scalars = numbers.normal(size=(5, 2, 3)).astype(np.float32)
    masks, examples = numbers.random((5, 7)) < 0.5, numbers.integers(1, 50, 5)
    masks[:, 0] = False
    coefs = aggregate_own(scalars, masks, examples, 0.1, weighting, clip=0.5)
    assert coefs.shape == (7, 2, 5, 3)
    weights = (examples if weighting == "examples" else np.ones(5))[:, None] * masks
    shares = weights / np.maximum(weights.sum(axis=0), 1)
    g = np.clip(scalars.astype(np.float64), -0.5, 0.5)
    expected = -0.1 / 3 * np.einsum("nb,nkp->bknp", shares, g)
    np.testing.assert_allclose(coefs, expected, rtol=1e-6, atol=0)
    # Along equal directions, own ones would come to what shared ones do.
    summed = coefs.astype(np.float64).sum(axis=2)
    shared = aggregate(scalars, masks, examples, 0.1, weighting, clip=0.5)
    np.testing.assert_allclose(summed, shared, rtol=1e-5, atol=1e-8)


def test_parts_are_bounded_by_the_median_one() -> None:
    """Parts are examples times length: 3, 8, 1000, 0 and 40; the median of those above 0 is 8."""
    scalars = np.array([3, 4, 10, 0, 40], np.float32).reshape(5, 1, 1)
    masks, examples = np.ones((5, 1), bool), np.array([1, 2, 100, 7, 1])
    free = aggregate_own(scalars, masks, examples, 1.0).reshape(-1)
    coefs = aggregate_own(scalars, masks, examples, 1.0, part_bound=2.0).reshape(-1)
    np.testing.assert_allclose(coefs / np.where(free, free, 1), [1, 1, 16 / 1000, 0, 16 / 40], 1e-6)
    alone = aggregate_own(scalars[2:3], masks[:1], examples[2:3], 1.0, part_bound=1.0)
    assert alone.item() == -10.0, "one client alone is the median"
    two = aggregate_own(scalars[1:3], masks[:2], examples[1:3], 1.0, part_bound=1.0).reshape(-1)
    assert two[0] == pytest.approx(two[1]), "of two the lower one decides"


@pytest.mark.parametrize("distribution", ["gaussian", "rank1"])
def test_entries_are_the_scalars_of_all_clients(make_world: Any, distribution: Any) -> None:
    world = make_world(directions="own", local_steps=2, distribution=distribution)
    seen = {name: spy(world.clients[name]) for name in NAMES}
    replies = {n: reply_of(world.clients[n].handle(world.plan(n))) for n in NAMES}
    start = copy_table(world.replicas["ada"].table)
    [report] = world.run(1).reports
    terms = report.entry.terms
    assert terms.samples == tuple(range(9)) * 2
    first, second = world.settings.seeds_of(1)
    assert terms.seeds == (first,) * 9 + (second,) * 9
    for n, name in enumerate(NAMES):
        active = torch.tensor(world.masks[n])
        mine = terms.coefs[:, 3 * n : 3 * n + 3]
        assert torch.equal((mine != 0).any(dim=1), active)
        assert {t.samples[-1] for t in seen[name]} == {3 * n, 3 * n + 1, 3 * n + 2}
        assert replies[name].scalars.shape == (2, 3)
    zk.add_noise_(start, terms.seeds, terms.coefs, distribution, samples=terms.samples)
    assert world.fingerprints() == {zk.fingerprint(start)}


def test_a_round_of_own_directions_teaches_more(make_world: Any) -> None:
    """The same evaluations; on a quadratic the best step along nine directions is nearly 3 times as
    good as that along three. Rates are the best of a few for each."""
    falls = {}
    for directions in ("own", "shared"):
        best = 0.0
        for lr in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0):
            masks = [[True] * 4] * 3
            world = make_world(masks=masks, directions=directions, weighting="uniform", lr=lr)
            table = world.replicas["ada"].table
            before = loss_of(table, 0.0)
            world.run(10)
            best = max(best, before - loss_of(table, 0.0))
        falls[directions] = best
    assert falls["own"] > 1.8 * falls["shared"], falls


# --- A model whose batch is cut into parts -------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(9, 13), nn.GELU(), nn.Linear(13, 9), nn.LayerNorm(9))
            for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def model_client(per_example: bool, count: int, **changes: Any) -> Client:
    model = Net()
    groups = {n: int(n.split(".")[1]) for n, _ in model.named_parameters()}
    table = active_table(model, groups)
    replica = Replica(table, model_fingerprint(model.named_parameters()), "rank1")
    x = torch.randn(count, 5, 9, generator=torch.Generator().manual_seed(1))

    def losses(batch: torch.Tensor) -> torch.Tensor:
        each = model(batch).square().mean(dim=(1, 2))
        return each if per_example else each.mean()

    objective = ModelObjective(
        model, table, lambda r, k: (x, count), losses, "rank1", per_example=per_example
    )
    assert objective.by_row == per_example
    return Client("ada", replica, objective, by_row=objective.by_row, **changes)


MASKS = [[True, False, True], [False, True, True]]


def asked(client: Client, path: Path, **changes: Any) -> Any:
    """The reply to the plan of a client that is the second of two."""
    client.name = "bob"
    settings = make_settings(distribution="rank1", directions="own", **changes)
    server = Server(settings, client.replica.identity, ("ada", "bob"), MASKS, path)
    greeting = server.begin_round(["bob"])["bob"]
    assert server.receive("bob", client.handle(greeting)).accepted
    reply = reply_of(client.handle(server.ask_again()["bob"]))
    server.close()
    return reply


@pytest.mark.parametrize("estimator", ["central", "forward"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("count", [12, 11, 2])
def test_each_part_of_a_batch_has_a_direction(
    tmp_path: Path, estimator: str, steps: int, count: int
) -> None:
    """Against weights that are really moved, direction by direction and step by step."""
    changes = {"estimator": estimator, "local_steps": steps, "num_perturbations": 4, "lr": 0.01}
    reply = asked(model_client(True, count), tmp_path / "log", **changes)
    settings = make_settings(distribution="rank1", **changes)
    net, eps, each = Net(), settings.eps, math.ceil(count / 4)
    x = torch.randn(count, 5, 9, generator=torch.Generator().manual_seed(1))
    groups = {n: int(n.split(".")[1]) for n, _ in net.named_parameters()}
    active = torch.tensor([0.0, 1.0, 1.0])[:, None]

    def losses(seeds: list[int], samples: list[int], coefs: list[float]) -> Any:
        start = {n: p.detach().clone() for n, p in net.named_parameters()}
        table = zk.ParamTable(dict(net.named_parameters()), groups=groups, num_groups=3)
        if seeds:
            zk.add_noise_(table, seeds, active * torch.tensor(coefs), "rank1", samples=samples)
        with torch.no_grad():
            found = net(x).square().mean(dim=(1, 2)).double()
            for name, parameter in net.named_parameters():
                parameter.copy_(start[name])
        return found

    seeds: list[int] = []
    samples: list[int] = []
    coefs: list[float] = []
    for step, seed in enumerate(settings.seeds_of(1)):
        for p in range(4):
            mine = slice(p * each, (p + 1) * each)
            at = [
                losses([*seeds, seed], [*samples, 4 + p], [*coefs, sign * eps])[mine]
                for sign in (1, -1)
            ]
            if estimator == "forward":
                at[1] = losses(seeds, samples, coefs)[mine]
            width = 2 * eps if estimator == "central" else eps
            expected = float((at[0] - at[1]).sum()) / width * 4 / count
            assert float(reply.scalars[step, p]) == pytest.approx(
                expected, abs=bound("scalar of a part")
            )
        seeds += [seed] * 4
        samples += range(4, 8)
        coefs += [-0.01 * float(g) / 4 for g in reply.scalars[step]]
    assert reply.num_examples == steps * count


@pytest.mark.parametrize("unit", ["example", "client"])
def test_private_clients_cut_their_batch_for_examples_alone(tmp_path: Path, unit: Any) -> None:
    """A client that is protected as a whole measures each direction on its whole batch."""
    accountant = PrivacyAccountant(Privacy(unit, 1.0, 4.0, 1e-5))
    client = model_client(True, 12, privacy=accountant)
    seen = spy(client)
    reply = asked(client, tmp_path / "log", num_perturbations=4)
    cut = [isinstance(terms, RowTerms) for terms in seen]
    assert cut == ([True] * 2 if unit == "example" else [False] * 8)
    assert reply.scalars.shape == (1, 4)
    assert reply.privacy.unit == unit
    one_step = PrivacyAccountant(Privacy(unit, 1.0, 4.0, 1e-5)).spent(1).epsilon
    assert reply.privacy.epsilon == pytest.approx(one_step), "a step is one release, cut or not"


def test_losses_that_are_not_of_rows_are_refused(tmp_path: Path) -> None:
    client = model_client(True, 6)
    inner = client.objective

    def halved(round_number: int, step: int) -> Any:
        evaluate, count = inner(round_number, step)
        return (lambda noises: [x[:3] for x in evaluate(noises)]), count

    client.objective = halved
    with pytest.raises(FederationError, match="6 examples by row, but got losses of shape"):
        asked(client, tmp_path / "log")
