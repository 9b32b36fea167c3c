"""LogFile, as a federation's server uses it: what was appended is there after a kill."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from zorba.identity import ModelIdentity
from zorba.log import (
    DamagedLogError,
    LogEntry,
    LogError,
    LogFile,
    LogHeader,
    decode_entries,
    encode_entry,
)
from zorba.optim import NoiseTerms

from tests.conftest import Random
from tests.log.world import assert_same_entry

BLOCKS = 4
IDENTITY = ModelIdentity(1, 1 << 63, 3, 4, BLOCKS)
HEADER = LogHeader(5, IDENTITY, "rademacher", "stochastic")


def make_entry(round_number: int, groups: int = BLOCKS, empty: bool = False) -> LogEntry:
    """P = 3; block 2 is not covered, and blocks 0 and 3 have the same clients."""
    if empty:
        return LogEntry(round_number, NoiseTerms.none(groups), 0)
    coefs = torch.arange(3.0) + torch.tensor([[0.5], [1.5], [0.0], [0.5]])
    coefs[2] = 0.0
    terms = NoiseTerms((1 << 63 | round_number,) * 3, (0, 1, 2), coefs[:1].repeat(groups, 1))
    terms.coefs[: len(coefs)] = coefs[:groups]
    return LogEntry(round_number, terms, 1000 + round_number, None, 70 + round_number, 9)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log of four rounds; nobody measured anything in the third."""
    path = tmp_path / "jobs" / "job.log"
    with LogFile(path, HEADER) as log:
        for t in range(1, 5):
            log.append(make_entry(t, empty=t == 3))
    return path


def sizes_of(log: LogFile) -> list[int]:
    return [len(encode_entry(entry, HEADER.log_id)) for entry in log.entries()]


def test_entries_come_back(path: Path) -> None:
    with LogFile(path, HEADER) as log:
        assert (log.first, log.last, log.cut_bytes, log.size) == (1, 4, 0, path.stat().st_size)
        assert (log.num_steps, log.num_skipped) == (3, 1)
        assert [e.number for e in log.entries(2, 3)] == [2, 3]
        assert list(log.entries(5)) == []
        assert_same_entry(log.entry(2), make_entry(2))
        assert log.entry(3).empty
        assert log.entry(2).uncovered() == [2]
        assert log.entry(2).scalar_bytes == 4 * 3 * 2 + 8, "two columns of three, and a seed"
        for first, last in ((0, 2), (1, 5), (6, None)):
            with pytest.raises(LogError, match="not in a log of 1 to 4"):
                list(log.entries(first, last))


def test_frames_travel_as_they_lie_in_the_file(path: Path) -> None:
    with LogFile(path, HEADER) as log:
        sizes = sizes_of(log)
        assert log.header == HEADER
        for limit in (0, sizes[1] - 1, sizes[1], sizes[1] + sizes[2], 1 << 20):
            count, data = log.frames(2, limit)
            assert count == sum(sum(sizes[1 : 2 + n]) <= limit for n in range(3))
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


def test_hundreds_of_terms_each_with_its_mask(rng: Random) -> None:
    """Own directions: eight clients of forty terms each, which move that client's blocks."""
    coefs = torch.zeros(BLOCKS, 320)
    for client in range(8):
        covered = torch.tensor([(client >> b) & 1 or b == client % BLOCKS for b in range(BLOCKS)])
        mine = slice(40 * client, 40 * client + 40)
        coefs[covered, mine] = rng.coefs(40)
    terms = NoiseTerms((7,) * 320, tuple(range(320)), coefs)
    entry = LogEntry(3, terms, 7, base=1, mask_version=2)
    data = encode_entry(entry, 5)
    assert_same_entry(decode_entries(data, 1, 3, BLOCKS, 5)[0], entry)
    assert entry.scalar_bytes == 4 * 320 + 8
    assert len(data) < 4 * 320 + 8 * 10 + 64, "a column of coefficients and a mask for each client"


def test_fingerprints_are_known_as_far_as_entries_tell(path: Path) -> None:
    with LogFile(path, HEADER) as log:
        assert log.fingerprint_after(0) == IDENTITY.start
        assert log.fingerprint_after(1) == 72
        assert log.fingerprint_after(2) == 74
        assert log.fingerprint_after(3) == 74, "the third changed no weight"
        assert log.fingerprint_after(4) is None
        log.append(make_entry(5, empty=True))
        assert log.fingerprint_after(4) is log.fingerprint_after(5) is None
        log.append(make_entry(6))
        assert log.fingerprint_after(4) == log.fingerprint_after(5) == 76


def test_a_torn_tail_is_cut_and_the_log_goes_on(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    with LogFile(path, HEADER) as log:
        sizes = sizes_of(log)
    start = len(data) - sum(sizes)
    whole = [start + sum(sizes[:t]) for t in range(len(sizes) + 1)]
    cut = tmp_path / "cut.log"
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        rounds = max(sum(end <= length for end in whole) - 1, 0)
        with LogFile(cut, HEADER, durable=False) as log:  # a header cut short is written again
            assert log.last == rounds
            assert log.cut_bytes == (length - whole[rounds] if length >= start else 0)
            log.append(make_entry(rounds + 1))
        with LogFile(cut, HEADER) as log:
            assert (log.last, log.cut_bytes) == (rounds + 1, 0)


def test_damage_elsewhere_is_an_error_that_changes_nothing(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    with LogFile(path, HEADER) as log:
        last = len(data) - sizes_of(log)[-1]
    damaged = tmp_path / "damaged.log"
    for at in range(last):
        flipped = bytearray(data)
        flipped[at] ^= 1 << (at % 8)
        damaged.write_bytes(flipped)
        with pytest.raises(LogError, match=r"damaged.log"):
            LogFile(damaged, HEADER)
        assert damaged.read_bytes() == flipped


def test_another_job_model_or_noise_is_refused(path: Path) -> None:
    data = path.read_bytes()
    other = ModelIdentity(2, 1 << 63, 3, 4, BLOCKS)
    for header, told in (
        (LogHeader(6, IDENTITY, "rademacher", "stochastic"), "another job"),
        (LogHeader(5, other, "rademacher", "stochastic"), "another model"),
        (LogHeader(5, IDENTITY, "gaussian", "stochastic"), "another distribution"),
        (LogHeader(5, IDENTITY, "rademacher", "nearest"), "another rounding"),
    ):
        with pytest.raises(LogError, match=told):
            LogFile(path, header)
    assert path.read_bytes() == data


def test_entries_out_of_order_or_of_another_model_are_refused(path: Path) -> None:
    with LogFile(path, HEADER) as log:
        for entry in (make_entry(4), make_entry(6), make_entry(5, BLOCKS + 1)):
            with pytest.raises(LogError):
                log.append(entry)
        assert log.last == 4
        log.append(make_entry(5))


def test_a_full_disk_leaves_the_log_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = path.read_bytes()
    with LogFile(path, HEADER) as log:

        def no_space(_: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", no_space)
            with pytest.raises(LogError, match=r"entry 5 was not written.*No space left"):
                log.append(make_entry(5))
        assert path.read_bytes() == data
        log.append(make_entry(5))
        assert log.last == 5


def test_entries_and_new_files_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with LogFile(tmp_path / "quick.log", HEADER, durable=False) as log:
        del synced[:]
        log.append(make_entry(1))
        assert synced == []


def test_two_servers_cannot_share_a_log(path: Path) -> None:
    with LogFile(path, HEADER), pytest.raises(LogError, match="another server"):
        LogFile(path, HEADER)


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
        together, said, done = context.Barrier(4), context.Queue(), context.Event()
        servers = [
            context.Process(target=start_server, args=(path, together, said, done))
            for _ in range(4)
        ]
        for server in servers:
            server.start()
        assert sorted(said.get() for _ in servers) == ["refused"] * 3 + ["wrote"]
        done.set()
        for server in servers:
            server.join()
        with LogFile(path, HEADER) as log:
            assert log.last == 1


def test_a_missing_log_is_made_only_with_a_header(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="there is no log"):
        LogFile(tmp_path / "none.log")
    assert list(tmp_path.iterdir()) == []
