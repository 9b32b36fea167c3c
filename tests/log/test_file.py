"""LogFile and TrajectoryWriter: what was appended is there after a kill, or is refused."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from zorba.log import DamagedLogError, Log, LogError, LogFile, TrajectoryWriter, decode_entries
from zorba.optim import NoiseTerms

import zorba_kernels as zk
from tests.conftest import Random
from tests.log import world
from tests.log.world import BLOCKS, GROUPS, HEADER, assert_same_entry, make_entry, make_table


def create(path: Path, table: zk.ParamTable | None = None, **options: Any) -> TrajectoryWriter:
    law = (table or make_table(), world.RUN_SEED, *world.LAW)
    return TrajectoryWriter.create(path, *law, **options)


def test_entries_come_back(rounds: Path) -> None:
    with LogFile(rounds, HEADER) as log:
        assert (log.first, log.last, log.torn_bytes, log.size) == (1, 4, 0, rounds.stat().st_size)
        assert (log.header, log.num_steps, log.num_skipped) == (HEADER, 3, 1)
        assert [e.number for e in log.entries(2, 3)] == [2, 3]
        assert list(log.entries(5)) == []
        assert_same_entry(log.entry(2), make_entry(2))
        assert log.entry(3).empty
        assert log.entry(2).uncovered() == [2]
        assert log.entry(2).scalar_bytes == 4 * 3 * 2 + 8, "two columns of three, and a seed"
        for first, last in ((0, 2), (1, 5), (6, None)):
            with pytest.raises(LogError, match="not in a log of 1 to 4"):
                list(log.entries(first, last))


def test_frames_travel_as_they_lie_in_the_file(rounds: Path) -> None:
    sizes = [end - world.ends(rounds)[1] for end in world.ends(rounds)[2:]]  # of 2, 2 to 3, ...
    with LogFile(rounds) as log:
        for limit in (0, sizes[0] - 1, *sizes, 1 << 20):
            count, data = log.frames(2, limit)
            assert count == sum(size <= limit for size in sizes)
            entries = decode_entries(data, count, 2, BLOCKS, HEADER.log_id)
            for mine, theirs in zip(entries, log.entries(2, 1 + count), strict=True):
                assert_same_entry(mine, theirs)
        assert log.frames(5, 1 << 20) == (0, b"")
        with pytest.raises(LogError, match="not in a log of 1 to 4"):
            log.frames(6, 1 << 20)
        _, data = log.frames(1, 1 << 20)
    for count, first, log_id, kind in (
        (4, 1, 6, DamagedLogError),  # another job's
        (4, 2, 5, LogError),  # in another place
        (5, 1, 5, DamagedLogError),  # one more than there are
        (3, 1, 5, LogError),  # one less
    ):
        with pytest.raises(kind):
            decode_entries(data, count, first, BLOCKS, log_id)


def test_fingerprints_are_known_as_far_as_entries_tell(rounds: Path) -> None:
    with LogFile(rounds, HEADER) as log:
        known = [log.fingerprint_after(number) for number in range(5)]
        assert known == [HEADER.identity.start, 72, 74, 74, None], "the third changed no weight"
        log.append(make_entry(5, empty=True))
        assert log.fingerprint_after(4) is log.fingerprint_after(5) is None
        log.append(make_entry(6))
        assert log.fingerprint_after(4) == log.fingerprint_after(5) == 76


def test_the_log_of_something_else_is_refused(rounds: Path, tmp_path: Path) -> None:
    data = rounds.read_bytes()
    for header, told in (
        (replace(HEADER, log_id=6), "another job"),
        (replace(HEADER, identity=replace(HEADER.identity, origin=2)), "another model"),
        (replace(HEADER, distribution="gaussian"), "another distribution"),
        (replace(HEADER, rounding="nearest"), "another rounding"),
    ):
        with pytest.raises(LogError, match=told):
            LogFile(rounds, header)
    assert rounds.read_bytes() == data
    with pytest.raises(LogError, match="there is no log"):
        LogFile(tmp_path / "none.log")
    assert not (tmp_path / "none.log").exists()


@pytest.mark.parametrize("told", ["written in part", "No space left"])
def test_a_full_disk_leaves_the_log_as_it_was(
    rounds: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    class Full:
        def write(self, record: bytes) -> int:
            taken = file.write(record[: len(record) // 2])
            if told == "No space left":
                raise OSError(28, "No space left on device")
            return taken

        def __getattr__(self, name: str) -> object:
            return getattr(file, name)

    data = rounds.read_bytes()
    with LogFile(rounds, HEADER) as log:
        file = log._file
        with monkeypatch.context() as patch:
            patch.setattr(log, "_file", Full())
            with pytest.raises(LogError, match=f"entry 5 was not written.*{told}"):
                log.append(make_entry(5))
        assert rounds.read_bytes() == data
        log.append(make_entry(5))
        assert log.last == 5


def test_what_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def spying(handle: int) -> None:
        synced.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        real(handle)

    monkeypatch.setattr(os, "fsync", spying)
    with LogFile(tmp_path / "new.log", HEADER) as log:
        assert synced == ["file", "folder"]
        log.append(make_entry(1))
        assert synced == ["file", "folder", "file"]
    with create(tmp_path / "quick.zot") as writer:
        del synced[:]
        writer.skip(0)
        assert synced == []
    assert synced == ["file"], "the end"


def start_server(path: Path, together: Any, said: Any, done: Any) -> None:
    together.wait()
    try:
        with LogFile(path, HEADER) as log:
            log.append(make_entry(log.last + 1))
            said.put("wrote")
            done.wait()
    except LogError as error:
        said.put("refused" if "another server" in str(error) else str(error))


def test_of_servers_that_start_together_one_makes_the_log(tmp_path: Path) -> None:
    """Creation and lock are one step: an entry that one of them wrote never vanishes."""
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        path = tmp_path / f"{attempt}.log"
        told = (path, context.Barrier(4), said := context.Queue(), done := context.Event())
        servers = [context.Process(target=start_server, args=told) for _ in range(4)]
        for server in servers:
            server.start()
        assert sorted(said.get() for _ in servers) == ["refused"] * 3 + ["wrote"]
        done.set()
        for server in servers:
            server.join()
        assert Log.read(path).last == 1


@pytest.mark.parametrize("step", [0, 7, 30])
def test_a_resumed_run_has_the_bytes_of_an_uninterrupted_one(
    tmp_path: Path, rng: Random, step: int
) -> None:
    updates, table = world.make_updates(30, rng), make_table()
    path = world.record(tmp_path / "run.zot", table, updates)
    whole, start = path.read_bytes(), world.ends(path)[step]
    with TrajectoryWriter.resume(path, table, step) as writer:
        assert path.stat().st_size == writer.log.size == start
        world.write(writer, updates, step)
    assert path.read_bytes() == whole


def test_a_file_is_resumed_only_where_it_fits(path: Path) -> None:
    data = path.read_bytes()
    with pytest.raises(LogError, match="has steps 0 to 7: it cannot go on with step 13"):
        TrajectoryWriter.resume(path, make_table(), 13)
    with pytest.raises(LogError, match="3 parameters are missing: layer"):
        TrajectoryWriter.resume(path, zk.ParamTable({"embed": world.WEIGHTS["embed"]}), 3)
    with pytest.raises(LogError, match="exists"):
        create(path)
    assert path.read_bytes() == data


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    shard = zk.ParamTable({"embed": torch.ones(4)}, offsets={"embed": 4})
    with pytest.raises(LogError, match="'embed' is a shard"):
        create(tmp_path / "x.zot", shard)
    with pytest.raises(LogError, match="settings must be plain JSON"):
        create(tmp_path / "x.zot", settings={"lr": float("nan")})
    with pytest.raises(LogError, match="unknown noise 'uniform'"):
        TrajectoryWriter.create(tmp_path / "x.zot", make_table(), 1, "uniform", "nearest")
    assert list(tmp_path.iterdir()) == []
    writer = create(tmp_path / "run.zot")
    size, good = writer.log.size, torch.ones(GROUPS, 1)
    for coefs, decay, told in (
        (torch.ones(1, 1), None, "coefs of 1 groups"),
        (good * float("nan"), None, "must be finite"),
        (good, torch.full((GROUPS,), float("inf")), "must be finite"),
        (good, torch.ones(2), "decays of 2 groups"),
    ):
        with pytest.raises(LogError, match=told):
            writer.append(0, NoiseTerms((1,), (0,), coefs), decay=decay)
    with pytest.raises(ValueError, match="rounding_seed"):
        writer.append(0, NoiseTerms((1,), (0,), good), rounding_seed=-1)
    for step in (1, -1):
        with pytest.raises(LogError, match=f"entry {step} came after entry -1"):
            writer.skip(step)
    assert writer.log.size == writer.log.path.stat().st_size == size
    writer.finish()
    with pytest.raises(LogError, match="is finished"):
        writer.skip(0)
