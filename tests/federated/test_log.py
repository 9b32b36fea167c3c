"""The log: what was appended is there after a kill, and damage is told, never read."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from zorba.federated import LogError, LogHeader, RoundLog
from zorba.federated.entry import split_records
from zorba.federated.log import HEADER_BYTES

from tests.federated.test_messages import make_entry
from tests.federated.world import make_replica

BLOCKS = make_replica().identity.num_blocks
HEADER = LogHeader(5, make_replica().identity, "rademacher", "stochastic")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log of four rounds; nobody measured anything in the third."""
    path = tmp_path / "jobs" / "job.log"
    with RoundLog(path, HEADER) as log:
        for t in range(1, 5):
            log.append(make_entry(t, BLOCKS, columns=0 if t == 3 else 2))
    return path


def ends(path: Path) -> list[int]:
    """Offset at which the header and each entry end."""
    with RoundLog(path) as log:
        sizes = [len(e.record) for e in log.entries(1)]
    return [HEADER_BYTES + sum(sizes[:t]) for t in range(len(sizes) + 1)]


def test_entries_come_back(path: Path) -> None:
    with RoundLog(path, HEADER) as log:
        assert (log.last_round, log.cut_bytes, log.size) == (4, 0, path.stat().st_size)
        assert [e.round for e in log.entries(2, 3)] == [2, 3]
        assert list(log.entries(5)) == []
        record = make_entry(2, BLOCKS).record
        assert log.entry(2).record == record
        for first, last in ((0, 2), (1, 5), (6, None)):
            with pytest.raises(LogError, match="not in a log of 4 rounds"):
                list(log.entries(first, last))


def test_records_are_the_bytes_of_whole_entries(path: Path) -> None:
    with RoundLog(path, HEADER) as log:
        sizes = [len(entry.record) for entry in log.entries(1)]
        for limit in (0, sizes[1] - 1, sizes[1], sizes[1] + sizes[2], 1 << 20):
            count, data = log.records(2, limit)
            assert count == sum(sum(sizes[1 : 2 + n]) <= limit for n in range(3))
            told = [entry.record for entry in split_records(data, count)]
            assert told == [entry.record for entry in log.entries(2, 1 + count)]
        assert log.records(5, 1 << 20) == (0, b"")
        with pytest.raises(LogError, match="not in a log of 4 rounds"):
            log.records(6, 1 << 20)


def test_fingerprints_are_known_as_far_as_entries_tell(path: Path) -> None:
    with RoundLog(path, HEADER) as log:
        told = [make_entry(t).base_fingerprint for t in range(1, 5)]
        assert log.fingerprint_after(0) == HEADER.identity.start
        assert log.fingerprint_after(1) == told[1]
        assert log.fingerprint_after(2) == told[2]
        assert log.fingerprint_after(3) == told[2], "the third changed no weight"
        assert log.fingerprint_after(4) is None
        log.append(replace(make_entry(5, BLOCKS, columns=0), base_fingerprint=None))
        assert log.fingerprint_after(4) is log.fingerprint_after(5) is None
        log.append(make_entry(6, BLOCKS))
        assert (
            log.fingerprint_after(4) == log.fingerprint_after(5) == make_entry(6).base_fingerprint
        )


def test_every_truncation_leaves_a_prefix_or_an_error(path: Path, tmp_path: Path) -> None:
    data, whole = path.read_bytes(), ends(path)
    cut = tmp_path / "cut.log"
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        if length < HEADER_BYTES:
            with pytest.raises(LogError, match="offset 0"):
                RoundLog(cut, HEADER)
            assert cut.read_bytes() == data[:length]
            continue
        rounds = sum(end <= length for end in whole) - 1
        with RoundLog(cut, HEADER) as log:
            assert log.last_round == rounds
            assert log.cut_bytes == length - whole[rounds]
            log.append(make_entry(rounds + 1, BLOCKS))
        with RoundLog(cut, HEADER) as log:
            assert (log.last_round, log.cut_bytes) == (rounds + 1, 0)


def test_every_flipped_bit_is_an_error_or_a_cut_of_the_last_entry(
    path: Path, tmp_path: Path
) -> None:
    data, whole = path.read_bytes(), ends(path)
    damaged = tmp_path / "damaged.log"
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << (at % 8)
        damaged.write_bytes(flipped)
        if at >= whole[3]:
            with RoundLog(damaged, HEADER) as log:
                assert (log.last_round, log.cut_bytes) == (3, len(data) - whole[3])
            continue
        told = "offset 0" if at < HEADER_BYTES else "offset [0-9]+, round [123]"
        with pytest.raises(LogError, match=told):
            RoundLog(damaged, HEADER)
        assert damaged.read_bytes() == flipped, "an error changes nothing"


def test_a_tail_of_zeros_is_cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data + bytes(5000))
    with RoundLog(path, HEADER) as log:
        assert (log.last_round, log.cut_bytes) == (4, 5000)
    assert path.read_bytes() == data


def test_another_job_model_or_noise_is_refused(path: Path) -> None:
    data = path.read_bytes()
    other = make_replica(frozen=2.0).identity
    for header, told in (
        (LogHeader(6, HEADER.identity, "rademacher", "stochastic"), "another job"),
        (LogHeader(5, other, "rademacher", "stochastic"), "another model"),
        (LogHeader(5, HEADER.identity, "gaussian", "stochastic"), "another distribution"),
        (LogHeader(5, HEADER.identity, "rademacher", "nearest"), "another rounding"),
    ):
        with pytest.raises(LogError, match=told):
            RoundLog(path, header)
    assert path.read_bytes() == data


def test_another_noise_version_is_refused(tmp_path: Path) -> None:
    header = LogHeader(5, HEADER.identity, "rademacher", "stochastic", noise_version=2)
    with pytest.raises(LogError, match="noise version 2, this package makes version 1"):
        RoundLog(tmp_path / "new.log", header)


def test_an_undamaged_entry_of_another_noise_version_is_not_cut(path: Path) -> None:
    record = replace(make_entry(5, BLOCKS), noise_version=2).record
    path.write_bytes(path.read_bytes() + record)
    with pytest.raises(LogError, match="round 5: log entry of noise version 2"):
        RoundLog(path, HEADER)


def test_entries_out_of_order_or_of_another_model_are_refused(path: Path) -> None:
    with RoundLog(path, HEADER) as log:
        for entry in (make_entry(4, BLOCKS), make_entry(6, BLOCKS), make_entry(5, BLOCKS + 1)):
            with pytest.raises(LogError):
                log.append(entry)
        assert log.last_round == 4
        log.append(make_entry(5, BLOCKS))


def test_a_full_disk_leaves_the_log_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = path.read_bytes()
    with RoundLog(path, HEADER) as log:

        def no_space(_: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", no_space)
            with pytest.raises(LogError, match=r"round 5 was not written.*No space left"):
                log.append(make_entry(5, BLOCKS))
        assert path.read_bytes() == data
        log.append(make_entry(5, BLOCKS))
        assert log.last_round == 5


def test_an_entry_is_synced_before_it_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.stat().st_size))
    with RoundLog(path, HEADER) as log:
        log.append(make_entry(5, BLOCKS))
        assert synced == [log.size]


def test_a_new_log_and_its_name_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def spying(handle: int) -> None:
        synced.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        real(handle)

    monkeypatch.setattr(os, "fsync", spying)
    RoundLog(tmp_path / "new.log", HEADER).close()
    assert synced == ["file", "folder"]


def test_two_servers_cannot_share_a_log(path: Path) -> None:
    with RoundLog(path, HEADER), pytest.raises(LogError, match="another server"):
        RoundLog(path, HEADER)


def test_a_missing_log_is_made_only_with_a_header(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="there is no log"):
        RoundLog(tmp_path / "none.log")
    assert list(tmp_path.iterdir()) == []
