"""Replicas: the same log makes the same bits, however it arrives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from zorba.federated import DivergedError, GapError, LogEntry, Replica, ReplicaError
from zorba.optim import NoiseTerms

import zorba_kernels as zk
from tests.federated.world import BLOCKS, make_entry, make_replica, make_settings

SETTINGS = make_settings(local_steps=2)


def make_log(rounds: int) -> list[LogEntry]:
    """Entries of random coefficients; every fifth is empty, every block is uncovered at times."""
    rng = np.random.default_rng(0)
    entries = []
    for t in range(1, rounds + 1):
        seeds = tuple(seed for seed in SETTINGS.seeds_of(t) for _ in range(3))
        coefs = rng.normal(size=(BLOCKS, 6)) * 0.01 * (rng.random((BLOCKS, 1)) < 0.7)
        terms = NoiseTerms(seeds, (0, 1, 2) * 2, torch.from_numpy(coefs.astype(np.float32)))
        terms = terms if t % 5 else NoiseTerms.none(BLOCKS)
        entries.append(LogEntry(t, terms, SETTINGS.rounding_seed_of(t)))
    return entries


def assert_same(one: Replica, other: Replica) -> None:
    assert one.applied_round == other.applied_round
    assert one.fingerprint(fresh=True) == other.fingerprint(fresh=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_catching_up_in_one_pass_equals_round_by_round(
    dtype: torch.dtype, rounding: str, distribution: str
) -> None:
    log = make_log(23)
    at_once, *others = (make_replica(dtype, distribution, rounding) for _ in range(3))
    assert at_once.apply(log) == 23
    for size, replica in zip((1, 7), others, strict=True):
        for first in range(0, 23, size):
            replica.apply(log[first : first + size])
        assert_same(at_once, replica)
    assert at_once.passes == 1
    assert at_once.fingerprint() != at_once.identity.start


def test_rounding_follows_the_seed_of_the_entry() -> None:
    (entry,) = make_log(1)
    replica, table = make_replica(torch.bfloat16), make_replica(torch.bfloat16).table
    replica.apply([entry])
    law, terms = ("gaussian", "stochastic", entry.rounding_seed), entry.terms
    zk.add_noise_(table, terms.seeds, terms.coefs, *law, samples=terms.samples)
    assert zk.fingerprint(table) == replica.fingerprint(fresh=True)


def test_applied_rounds_are_not_applied_twice() -> None:
    log = make_log(6)
    twice, once = make_replica(), make_replica()
    once.apply(log)
    assert [twice.apply(part) for part in (log[:4], log[:4], log[2:], log)] == [4, 0, 2, 0]
    assert_same(twice, once)


def test_entries_that_do_not_fit_are_refused_and_change_nothing() -> None:
    log, replica, expected = make_log(6), make_replica(), make_replica()
    for each in (replica, expected):
        each.apply(log[:2])
    for entries, needed in ((log[3:], 3), ([log[2], log[4]], 4), ([log[2], log[2]], 4)):
        with pytest.raises(GapError, match=f"ask for the log from round {needed}"):
            replica.apply(entries)
    with pytest.raises(ReplicaError, match=f"{BLOCKS + 1} blocks, this replica has {BLOCKS}"):
        replica.apply([make_entry(3, blocks=BLOCKS + 1)])
    assert_same(replica, expected)


def test_weights_changed_from_outside_are_noticed() -> None:
    log, replica = make_log(3), make_replica()
    replica.apply(log[:1])
    good = replica.fingerprint()
    with torch.no_grad():
        replica.table.entries[0].tensor[3] += 1
    replica.fingerprint(fresh=True)
    with pytest.raises(DivergedError, match="changed from outside"):
        replica.apply([replace(log[1], base=good)])
    assert replica.applied_round == 1


def test_interrupted_pass_is_not_forgotten() -> None:
    replica = make_replica()
    interrupted = patch.object(zk.ParamTable, "run", side_effect=KeyboardInterrupt)
    with interrupted, pytest.raises(KeyboardInterrupt):
        replica.apply(make_log(1))
    for use in (lambda: replica.apply(make_log(1)), replica.fingerprint):
        with pytest.raises(ReplicaError, match="interrupted"):
            use()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    log, path = make_log(8), tmp_path / "replica.safetensors"
    replica, loaded = make_replica(dtype), make_replica(dtype)
    replica.bind(SETTINGS.job_id)
    replica.apply(log[:5])
    replica.save(path)
    replica.save(path)
    assert list(tmp_path.iterdir()) == [path], "no drafts are left"
    loaded.load(path)
    assert (loaded.applied_round, loaded.job) == (5, SETTINGS.job_id)
    assert_same(loaded, replica)
    for each in (loaded, replica):
        each.apply(log)
    assert_same(loaded, replica)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"dtype": torch.bfloat16}, "expected"),
        ({"distribution": "rademacher"}, "distribution"),
        ({"rounding": "nearest"}, "rounding"),
        ({"frozen": 2.0}, "another model"),
    ],
    ids=["dtype", "distribution", "rounding", "frozen"],
)
def test_checkpoint_that_does_not_fit_changes_nothing(
    tmp_path: Path, other: dict[str, Any], told: str
) -> None:
    saved, replica = make_replica(), make_replica(**other)
    saved.apply(make_log(2))
    saved.save(tmp_path / "saved")
    with pytest.raises(ReplicaError, match=told):
        replica.load(tmp_path / "saved")
    assert_same(replica, make_replica(**other))


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "replica.safetensors"
    make_replica().save(path)
    data = path.read_bytes()
    flipped = data[:-9] + bytes([data[-9] ^ 4]) + data[-8:]
    renamed = data.replace(b"blocks.1.weight", b"blocks.9.weight")
    for damaged in (data[:-1], data[:20], b"", flipped, renamed, None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        replica = make_replica()
        with pytest.raises(ReplicaError, match=r"replica\.safetensors"):
            replica.load(path)
        assert_same(replica, make_replica())


def test_replica_of_another_job_is_refused() -> None:
    replica = make_replica()
    replica.bind(1)
    replica.bind(2)  # nothing of job 1 was applied
    replica.apply(make_log(1))
    with pytest.raises(ReplicaError, match="start again from the original model"):
        replica.bind(3)


def test_models_that_share_shapes_have_other_identities() -> None:
    mine, entries = make_replica().identity, make_replica().table.entries
    names = {e.name: e.name for e in entries}
    groups = {e.name: e.group for e in entries}

    def changed(names: dict[str, str], groups: dict[str, int]) -> Replica:
        table = zk.ParamTable(
            {names[e.name]: e.tensor for e in entries},
            groups={names[name]: group for name, group in groups.items()},
        )
        return Replica(table, mine.origin or 0)

    assert mine == make_replica().identity
    for other, told in (
        (make_replica(frozen=2.0), "all parameters"),
        (make_replica(torch.bfloat16), "dtypes"),
        (changed({n: n.replace("blocks", "layers") for n in names}, groups), "names"),
        (changed(names, {n: (g + 1) % BLOCKS for n, g in groups.items()}), "blocks"),
    ):
        assert told in (mine.difference(other.identity) or "")
