"""The file: what was appended comes back, and damage is told, never replayed."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zorba.log import Log, LogEntry, LogError, TrajectoryWriter, encode_entry
from zorba.log.frame import END, ENTRY, SKIP, BodyReader, frame, salt_of, varint
from zorba.log.header import decode_header
from zorba.log.pattern import decode_pattern, encode_pattern, resolve
from zorba.optim import NoiseTerms, step_seed

import zorba_kernels as zk
from tests.conftest import Random
from tests.log.world import (
    GROUPS,
    NAMES,
    RUN_SEED,
    WEIGHTS,
    assert_same_entry,
    make_table,
    make_updates,
    record,
)


def ends(path: Path) -> list[int]:
    """Offset at which the header, each step and the end of the run end."""
    data = path.read_bytes()
    log = Log(data)
    frames = [encode_entry(e, log.header.log_id, RUN_SEED) for e in log.entries()]
    start = decode_header(data)[1]
    return [start + sum(map(len, frames[:n])) for n in range(len(frames) + 1)] + [len(data)]


def test_header_comes_back(tmp_path: Path) -> None:
    table = make_table(WEIGHTS)
    told = {"lr": 1e-6, "name": "größer", "list": [1, None, True]}
    writer = TrajectoryWriter.create(
        tmp_path / "runs" / "run.zot",
        table,
        (1 << 64) - 1,
        "gaussian",
        "nearest",
        settings=told,
        first_step=40,
    )
    assert writer.size == writer.path.stat().st_size
    writer.close()
    trajectory = Log.read(writer.path)
    header = trajectory.header
    assert header == writer.log.header
    assert [(p.name, p.group) for p in header.parameters] == list(NAMES.items())
    assert [(p.shape, p.dtype) for p in header.parameters] == [
        (tuple(e.tensor.shape), "bfloat16") for e in table.entries
    ]
    assert (header.identity.start, header.identity.origin) == (zk.fingerprint(table), None)
    assert (header.settings, header.first) == (told, 40)
    assert (trajectory.num_steps, trajectory.last) == (0, 39)
    assert list(trajectory.entries()) == []


def test_steps_come_back(tmp_path: Path, rng: Random) -> None:
    updates = make_updates(300, rng)
    record(tmp_path / "run.zot", make_table(WEIGHTS), updates)
    entries = Log.read(tmp_path / "run.zot").entries()
    for number, (entry, update) in enumerate(zip(entries, updates, strict=True)):
        assert entry.empty == (update is None)
        if update is not None:
            terms, rounding_seed, decay = update
            seed = rounding_seed if rounding_seed is not None else next(iter(terms.seeds), 0)
            assert_same_entry(entry, LogEntry(number, terms, seed, decay))


@settings(deadline=None)
@given(
    step=st.integers(0, 60),
    terms=st.lists(
        st.tuples(st.integers(0, 62) | st.integers(1 << 63, (1 << 64) - 1), st.integers(0, 3)),
        max_size=30,
    ),
    high=st.integers(0, (1 << 31) - 4),
)
def test_any_pattern_comes_back(step: int, terms: list[tuple[int, int]], high: int) -> None:
    """Seeds below the step stand for those of steps, all others are foreign."""
    seeds = tuple(seed for seed, _ in terms)
    samples = tuple(high + sample for _, sample in terms)
    data = encode_pattern(seeds, samples, step, lambda s: s if s <= step else None)
    reader = BodyReader(memoryview(data))
    runs = decode_pattern(reader)
    assert reader.left == 0
    assert resolve(runs, step, lambda s: s) == (seeds, samples)


def test_momentum_takes_a_few_bytes() -> None:
    both = [s for s in range(1000, 1050) for _ in range(2)]
    data = encode_pattern(both, [0, 1] * 50, 1049, lambda s: s)
    assert len(data) == 5
    assert decode_pattern(BodyReader(memoryview(data)))[0].seeds == 50


@given(st.integers(0, (1 << 63) - 1))
def test_varints_come_back(value: int) -> None:
    reader = BodyReader(memoryview(varint(value)))
    assert reader.varint("it") == value
    assert reader.left == 0


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80\x00", b"\xff" * 9 + b"\x01"])
def test_other_bytes_are_no_varints(data: bytes) -> None:
    with pytest.raises(LogError):
        BodyReader(memoryview(data)).varint("it")


def test_a_thousand_steps_take_twenty_kilobytes(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(272)]
    table = zk.ParamTable(
        {n: torch.full((2,), 0.1) for n in names}, {n: i % 30 for i, n in enumerate(names)}
    )
    writer = TrajectoryWriter.create(tmp_path / "run.zot", table, 3, "rademacher", "stochastic")
    header = writer.size
    for step in range(1000):
        coefs = torch.full((30, 1), float(step) + 0.5)
        writer.append(step, NoiseTerms((step_seed(3, step),), (0,), coefs))
    writer.finish()
    assert writer.path.stat().st_size == writer.size <= 20_000
    assert writer.size <= header + 1000 * 16
    assert header < 2000


# --- Damage --------------------------------------------------------------------------------------


def test_every_truncation_leaves_a_prefix_or_an_error(path: Path) -> None:
    data, whole = path.read_bytes(), ends(path)
    table = make_table(WEIGHTS)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        if length < whole[0]:
            with pytest.raises(LogError, match=r"run.zot: .*"):
                Log.read(path)
            continue
        kept = sum(end <= length for end in whole) - 1
        trajectory = Log.read(path)
        assert trajectory.last == kept - 1
        assert (trajectory.size, trajectory.torn_bytes) == (whole[kept], length - whole[kept])
        assert trajectory.fingerprint is None
        assert path.read_bytes() == data[:length], "reading changes nothing"
        writer = TrajectoryWriter.resume(path, table, kept)
        writer.skip(kept)
        writer.close()
        again = Log.read(path)
        assert (again.last, again.torn_bytes) == (kept, 0)
        assert path.read_bytes()[: whole[kept]] == data[: whole[kept]]


def test_a_flipped_bit_is_an_error_or_cuts_the_last_entry(path: Path, rng: Random) -> None:
    data, whole = path.read_bytes(), ends(path)
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << rng.integer(3)
        if at >= whole[-2]:
            trajectory = Log(bytes(flipped))
            assert trajectory.fingerprint is None
            assert trajectory.torn_bytes == len(data) - whole[-2]
            continue
        with pytest.raises(LogError):
            Log(bytes(flipped))


def test_entries_of_another_place_or_file_do_not_pass(path: Path, tmp_path: Path) -> None:
    data, whole = path.read_bytes(), ends(path)
    moved = data[: whole[2]] + data[whole[1] : whole[2]] + data[whole[2] :]
    with pytest.raises(LogError, match="it is entry 1, expected 2"):
        Log(moved)
    record(tmp_path / "other.zot", make_table(WEIGHTS), make_updates(12, Random(99)), "gaussian")
    other = (tmp_path / "other.zot").read_bytes()
    assert Log(other[: ends(tmp_path / "other.zot")[0]] + data[whole[0] :]).last == -1


def test_a_tail_of_zeros_is_ignored(path: Path) -> None:
    data = path.read_bytes()
    trajectory = Log(data + bytes(5000))
    assert (trajectory.size, trajectory.torn_bytes) == (len(data), 5000)
    assert trajectory.fingerprint is not None


def test_a_crafted_tail_costs_no_quadratic_time(path: Path) -> None:
    """Heads that pass their check, each with a long body: bytes read are counted, not seconds."""
    salt = salt_of(Log(path.read_bytes()).header.log_id)
    body = bytes(60_000)
    head = frame(ENTRY, 8, body, salt)[: -len(body) - 4]
    with pytest.raises(LogError, match="neither whole nor torn"):
        Log(path.read_bytes() + b"\x01" + head * 20_000 + body)


def valid(path: Path, kind: int, body: bytes) -> bytes:
    """The file with one more entry, whose CRC is right."""
    data = path.read_bytes()
    log = Log(data)
    return data + frame(kind, log.last + 1, body, salt_of(log.header.log_id))


RUN = b"\x01\x01\x00\x01\x01"  # one run: this step's seed, samples from 0, 1 of them, 1 seed


@pytest.mark.parametrize(
    ("kind", "body", "told"),
    [
        (ENTRY, b"\x00", "number of terms needs 1 bytes"),
        (ENTRY, b"\x00\x01" + bytes(3), "coefficients needs 4 bytes but 3 are left"),
        (ENTRY, b"\x01" + RUN + bytes(5), "1 bytes follow"),
        (ENTRY, b"\x00\x01" + struct.pack("<f", float("nan")), "not all finite"),
        (ENTRY, b"\x10\x01" + struct.pack("<ff", float("inf"), 1.0), "not all finite"),
        (ENTRY, b"\x01\x01\x02\x00\x01\x01" + bytes(4), "step 0 has terms of steps -1 to -1"),
        (ENTRY, b"\x01\x01\x01\x00\x01\x02" + bytes(8), "step 0 has terms of steps 0 to 1"),
        (ENTRY, b"\x01\x01\x01\x00\x00\x01", "0 samples from 0"),
        (ENTRY, b"\x01\x01\x01" + varint((1 << 31) - 1) + b"\x02\x01" + bytes(8), "2 samples from"),
        (ENTRY, b"\x01\x01\x01\x00" + varint(1 << 20) + b"\x02", "2097152 terms; at most"),
        (ENTRY, b"\x00" + varint(1 << 20), "coefficients needs"),
        (ENTRY, b"\x00" + varint(1 << 40), "over the limits"),
        (ENTRY, b"\x01" + varint(1 << 60), "seed of a run needs 1 bytes"),
        (ENTRY, b"\x04\x01\x04" + bytes(99), "1 terms and 4 columns is too large"),
        (ENTRY, b"\x04\x01\x01\x00\x02\x00" + bytes(4), "must be below 1"),
        (ENTRY, b"\x02\x02\x03", "2 terms in 3 parts"),
        (ENTRY, b"\x02\x02\x01\x01" + bytes(4), "1 of 2 terms are in no part"),
        (ENTRY, b"\x02\x02\x01\x03" + bytes(12), "a part of 3 terms"),
        (SKIP, b"\x00", "1 bytes follow"),
        (END, bytes(7), "the end has 7 bytes"),
    ],
)
def test_whole_entries_that_make_no_sense_are_refused(
    tmp_path: Path, kind: int, body: bytes, told: str
) -> None:
    path = tmp_path / "run.zot"
    TrajectoryWriter.create(path, make_table(WEIGHTS), 1, "gaussian", "nearest").close()
    tracemalloc.start()
    try:
        with pytest.raises(LogError, match=f"offset [0-9]+, entry 0: .*{told}"):
            Log(valid(path, kind, body))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20, "refused before it is allocated"
    finally:
        tracemalloc.stop()


def test_nothing_follows_the_end(path: Path) -> None:
    with pytest.raises(LogError, match="an entry after the end"):
        Log(valid(path, SKIP, b""))


def test_a_header_is_not_unpacked_further_than_it_says(path: Path) -> None:
    data = path.read_bytes()
    header, end = decode_header(data)
    bomb = zlib.compress(bytes(1 << 26), 9)
    forged = data[:12] + struct.pack("<II", 1000, len(bomb)) + bomb
    tracemalloc.start()
    try:
        with pytest.raises(LogError, match="should have 1000 bytes"):
            decode_header(forged + struct.pack("<I", zlib.crc32(forged)))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert header.num_groups == GROUPS
    assert end > 20


def test_other_files_are_told(tmp_path: Path) -> None:
    for data in (b"", b"x", b"ZORBAL\0\0", b"safetensors"):
        (tmp_path / "x.zot").write_bytes(data)
        with pytest.raises(LogError, match="no log"):
            Log.read(tmp_path / "x.zot")
    for old in (b"ZORBAZOT\1\0", b"ZORBALOG\1\0"):
        (tmp_path / "x.zot").write_bytes(old + bytes(100))
        with pytest.raises(LogError, match=r"of version 0.1.0: read it with the package"):
            Log.read(tmp_path / "x.zot")
    with pytest.raises(LogError, match="cannot be read"):
        Log.read(tmp_path / "missing.zot")
