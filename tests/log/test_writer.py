"""TrajectoryWriter: what can be recorded, resumed and finished."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch
from zorba.log import Log, LogError, TrajectoryWriter
from zorba.optim import NoiseTerms

import zorba_kernels as zk
from tests.conftest import Random
from tests.log.world import (
    GROUPS,
    RUN_SEED,
    WEIGHTS,
    make_table,
    make_updates,
    record,
)


def test_a_resumed_run_has_the_bytes_of_an_uninterrupted_one(tmp_path: Path, rng: Random) -> None:
    updates = make_updates(30, rng)
    table = make_table(WEIGHTS)
    record(tmp_path / "whole.zot", table, updates)
    whole = (tmp_path / "whole.zot").read_bytes()
    for step in (0, 7, 30):
        (tmp_path / "cut.zot").write_bytes(whole)
        writer = TrajectoryWriter.resume(tmp_path / "cut.zot", table, step)
        for number in range(step, 30):
            update = updates[number]
            if update is None:
                writer.skip(number)
            else:
                writer.append(number, *update)
        writer.finish()
        assert (tmp_path / "cut.zot").read_bytes() == whole


def test_a_file_is_resumed_only_where_it_fits(path: Path) -> None:
    data = path.read_bytes()
    with pytest.raises(LogError, match="has steps 0 to 7: it cannot go on with step 13"):
        TrajectoryWriter.resume(path, make_table(WEIGHTS), 13)
    with pytest.raises(LogError, match="3 parameters are missing: layer"):
        TrajectoryWriter.resume(path, zk.ParamTable({"embed": WEIGHTS["embed"]}), 3)
    assert path.read_bytes() == data
    with pytest.raises(LogError, match="exists"):
        TrajectoryWriter.create(path, make_table(WEIGHTS), 1, "gaussian", "nearest")


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    table = make_table(WEIGHTS)
    create = TrajectoryWriter.create
    shard = zk.ParamTable({"embed": torch.ones(4)}, offsets={"embed": 4})
    with pytest.raises(LogError, match="'embed' is a shard"):
        create(tmp_path / "shard.zot", shard, 1, "gaussian", "nearest")
    with pytest.raises(LogError, match="settings must be plain JSON"):
        create(tmp_path / "x.zot", table, 1, "gaussian", "nearest", settings={"lr": float("nan")})
    with pytest.raises(ValueError, match="distribution"):
        create(tmp_path / "x.zot", table, 1, "uniform", "nearest")
    assert list(tmp_path.iterdir()) == []
    writer = create(tmp_path / "run.zot", table, 1, "gaussian", "nearest")
    size = writer.size
    good = torch.ones(GROUPS, 1)
    for terms, decay, told in (
        (NoiseTerms((1,), (0,), torch.ones(1, 1)), None, "coefs of 1 groups"),
        (NoiseTerms((1,), (0,), good * float("nan")), None, "must be finite"),
        (NoiseTerms((1,), (0,), good), torch.full((GROUPS,), float("inf")), "must be finite"),
        (NoiseTerms((1,), (0,), good), torch.ones(2), "decays of 2 groups"),
    ):
        with pytest.raises(LogError, match=told):
            writer.append(0, terms, decay=decay)
    with pytest.raises(ValueError, match="rounding_seed"):
        writer.append(0, NoiseTerms((1,), (0,), good), rounding_seed=-1)
    for step in (1, -1):
        with pytest.raises(LogError, match=f"entry {step} came after entry -1"):
            writer.skip(step)
    assert writer.size == writer.path.stat().st_size == size
    writer.finish()
    with pytest.raises(LogError, match="is finished"):
        writer.skip(0)


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    table = make_table(WEIGHTS)
    writer = TrajectoryWriter.create(tmp_path / "run.zot", table, 1, "gaussian", "nearest")
    data = writer.path.read_bytes()
    file = writer.log._file

    class Full:
        """A file that takes half of what it is given."""

        def write(self, record: bytes) -> int:
            return file.write(record[: len(record) // 2])

        def __getattr__(self, name: str) -> object:
            return getattr(file, name)

    writer.log._file = Full()  # type: ignore[assignment]
    terms = NoiseTerms((1,), (0,), torch.ones(GROUPS, 1))
    with pytest.raises(LogError, match="entry 0 was not written"):
        writer.append(0, terms)
    assert writer.path.read_bytes() == data
    writer.log._file = file
    writer.append(0, terms)
    writer.finish()
    assert Log.read(writer.path).num_steps == 1


def test_an_exception_leaves_an_unfinished_file(tmp_path: Path) -> None:
    table = make_table(WEIGHTS)
    create = TrajectoryWriter.create
    with (
        contextlib.suppress(KeyboardInterrupt),
        create(tmp_path / "run.zot", table, 1, "gaussian", "nearest") as writer,
    ):
        writer.skip(0)
        raise KeyboardInterrupt
    trajectory = Log.read(tmp_path / "run.zot")
    assert (trajectory.fingerprint, trajectory.last) == (None, 0)


def test_the_end_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table(WEIGHTS)
    writer = TrajectoryWriter.create(tmp_path / "run.zot", table, RUN_SEED, "gaussian", "nearest")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(writer.path.stat().st_size))
    writer.finish()
    assert synced == [writer.size]
