"""Settings and masks refuse what makes no sense."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from zorba.federated import Server

from tests.federated.world import MASKS, NAMES, World, make_settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("job", v) for v in ("", 3, "x" * 201)),
        *(("seed", v) for v in (-1, 1 << 64, 1.5)),
        *(("num_perturbations", v) for v in (0, 4097)),
        *(("local_steps", v) for v in (0, True)),
        *(("eps", v) for v in (0.0, math.nan, 1e300, 1e-300, "small")),
        *(("lr", v) for v in (-1.0, math.inf, None)),
        *(("trim", v) for v in (0.5, -0.1, math.nan)),
        ("clip", 0.0),
        ("clients_per_round", 0),
        ("estimator", "backward"),
        ("distribution", "cauchy"),
        ("rounding", "up"),
        ("weighting", "votes"),
        ("aggregation", "krum"),
    ],
)
def test_bad_setting_is_named(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        make_settings(**{name: value})


def test_schedule_is_checked_when_used() -> None:
    settings = make_settings(lr=lambda r: 0.1 if r < 3 else math.nan)
    assert settings.lr_at(2) == 0.1
    with pytest.raises(ValueError, match="lr of round 3"):
        settings.lr_at(3)


def test_seeds_differ_by_job_round_and_step() -> None:
    one, other = (make_settings(seed=seed, local_steps=5) for seed in (7, 8))
    seeds = {seed for s in (one, other) for r in range(1, 20) for seed in s.seeds_of(r)}
    assert len(seeds) == 2 * 19 * 5
    assert len({one.rounding_seed_of(r) for r in range(1, 20)} | seeds) == 2 * 19 * 5 + 19
    assert one.seeds_of(3)[:1] == make_settings().seeds_of(3)
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
    ids=["shape", "dtype", "idle", "same name", "no name"],
)
def test_bad_masks_are_refused(
    world: World, tmp_path: Path, names: Any, masks: Any, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        Server(world.settings, world.identity, names, masks, tmp_path / "log")
    assert not (tmp_path / "log").exists()
