"""Settings and masks refuse what makes no sense."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.federated.world import MASKS, NAMES, World, make_settings


@pytest.mark.parametrize(
    "change",
    [
        {"job": ""},
        {"seed": -1},
        {"seed": 1 << 64},
        {"seed": 1.5},
        {"num_perturbations": 0},
        {"local_steps": 0},
        {"local_steps": True},
        {"eps": 0.0},
        {"eps": math.nan},
        {"eps": 1e300},
        {"eps": 1e-300},
        {"eps": "small"},
        {"lr": -1.0},
        {"lr": math.inf},
        {"lr": None},
        {"clip": 0.0},
        {"clients_per_round": 0},
        {"estimator": "backward"},
        {"distribution": "cauchy"},
        {"rounding": "up"},
        {"weighting": "votes"},
        {"aggregation": "krum"},
        {"trim": 0.5},
        {"trim": -0.1},
        {"trim": math.nan},
    ],
    ids=str,
)
def test_bad_setting_is_named(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises((ValueError, TypeError), match=name):
        make_settings(**change)


def test_schedule_is_checked_when_used() -> None:
    settings = make_settings(lr=lambda r: 0.1 if r < 3 else math.nan)
    assert settings.lr_at(2) == 0.1
    with pytest.raises(ValueError, match="lr of round 3"):
        settings.lr_at(3)


def test_seeds_differ_by_job_round_and_step() -> None:
    one, other = make_settings(), make_settings(seed=8)
    seeds = {s.seed_of(r, k) for s in (one, other) for r in range(1, 20) for k in range(5)}
    assert len(seeds) == 2 * 19 * 5
    assert len({one.rounding_seed_of(r) for r in range(1, 20)} | seeds) == 2 * 19 * 5 + 19
    assert one.seed_of(3, 0) == make_settings().seed_of(3, 0)
    assert one.job_id != make_settings(job="other").job_id


@pytest.mark.parametrize(
    ("names", "masks", "told"),
    [
        (NAMES, [row[:3] for row in MASKS], "clients, blocks"),
        (NAMES, [[1, 0, 0, 1]] * 3, "bool"),
        (NAMES, [*MASKS[:2], [False] * 4], "cleo activates no block"),
        (("ada", "ada", "bob"), MASKS, "differ"),
        (("ada", "b b", "cleo"), MASKS, "b b"),
    ],
)
def test_bad_masks_change_nothing(world: World, names: Any, masks: Any, told: str) -> None:
    before = world.plan("ada")
    with pytest.raises(ValueError, match=told):
        world.server.set_masks(names, masks)
    assert world.server.begin_round()["ada"] == before


def test_settings_of_another_job_are_refused(world: World) -> None:
    for change in ({"job": "other"}, {"seed": 8}, {"rounding": "nearest"}):
        with pytest.raises(ValueError, match="must stay"):
            world.server.set_settings(make_settings(**change))


def test_drawn_clients_change_from_round_to_round(tmp_path: Path) -> None:
    world = World(tmp_path / "log", make_settings(clients_per_round=2))
    world.greet()
    drawn = []
    for _ in range(12):
        drawn.append(tuple(world.server.begin_round()))
        assert tuple(world.server.begin_round()) == drawn[-1], "a round begun again draws the same"
        world.server.end_round()
    assert {len(names) for names in drawn} == {2}
    assert len(set(drawn)) == 3, "all three pairs come up"
    world.server.close()
