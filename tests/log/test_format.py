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
from zorba.log import Trajectory, TrajectoryError, TrajectoryWriter
from zorba.log.file import parse
from zorba.log.frame import BodyReader, frame, varint
from zorba.log.header import FIXED_BYTES, decode_header
from zorba.log.pattern import decode_pattern, encode_pattern, resolve
from zorba.optim import NoiseTerms, step_seed

import zorba_kernels as zk
from tests.conftest import Random
from tests.log.world import (
    GROUPS,
    NAMES,
    WEIGHTS,
    make_table,
    make_updates,
    record,
)


def ends(path: Path) -> list[int]:
    """Offset at which the header, each step and the footer end."""
    data = path.read_bytes()
    trajectory = parse(data)
    first, last = trajectory.header.first_step, trajectory.next_step
    return [trajectory.position(step)[0] for step in range(first, last + 1)] + [len(data)]


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
    trajectory = Trajectory.read(writer.path)
    header = trajectory.header
    assert header == writer.header
    assert [(p.name, p.group) for p in header.parameters] == list(NAMES.items())
    assert [(p.shape, p.dtype) for p in header.parameters] == [
        (tuple(e.tensor.shape), torch.bfloat16) for e in table.entries
    ]
    assert (header.base, header.whole) == (zk.fingerprint(table), None)
    assert (header.settings, header.first_step) == (told, 40)
    assert (trajectory.num_steps, trajectory.next_step) == (0, 40)
    assert list(trajectory.steps()) == []


def test_steps_come_back(tmp_path: Path, rng: Random) -> None:
    updates = make_updates(300, rng)
    record(tmp_path / "run.zot", make_table(WEIGHTS), updates)
    steps = iter(Trajectory.read(tmp_path / "run.zot").steps())
    for number, update in enumerate(updates):
        if update is None:
            continue
        terms, rounding_seed, decay = update
        step = next(steps)
        assert step.step == number
        assert (step.terms.seeds, step.terms.samples) == (terms.seeds, terms.samples)
        assert torch.equal(step.terms.coefs.view(torch.int32), terms.coefs.view(torch.int32))
        expected = rounding_seed if rounding_seed is not None else next(iter(terms.seeds), 0)
        assert step.rounding_seed == expected
        assert step.decay is None if decay is None else torch.equal(step.decay, decay)
    assert next(steps, None) is None


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


def test_momentum_is_told_in_a_few_bytes() -> None:
    for seeds in (range(1000, 1050), range(1049, 999, -1)):
        both = [s for s in seeds for _ in range(2)]
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
    with pytest.raises(TrajectoryError):
        BodyReader(memoryview(data)).varint("it")


def test_a_thousand_steps_take_ten_bytes_each(tmp_path: Path) -> None:
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
    assert writer.path.stat().st_size == writer.size == header + 1000 * 10 + 5 + 14
    assert header < 2000


# --- Damage --------------------------------------------------------------------------------------


def test_every_truncation_leaves_a_prefix_or_an_error(path: Path) -> None:
    data, whole = path.read_bytes(), ends(path)
    table = make_table(WEIGHTS)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        if length < whole[0]:
            with pytest.raises(TrajectoryError, match=r"run.zot: .*"):
                Trajectory.read(path)
            continue
        kept = sum(end <= length for end in whole) - 1
        trajectory = Trajectory.read(path)
        assert trajectory.next_step == kept
        assert (trajectory.size, trajectory.torn_bytes) == (whole[kept], length - whole[kept])
        assert trajectory.fingerprint is None
        assert path.read_bytes() == data[:length], "reading changes nothing"
        writer = TrajectoryWriter.resume(path, table, kept)
        writer.skip(kept)
        writer.close()
        again = Trajectory.read(path)
        assert (again.next_step, again.torn_bytes) == (kept + 1, 0)
        assert path.read_bytes()[: whole[kept]] == data[: whole[kept]]


def test_every_flipped_bit_is_an_error_or_cuts_the_last_record(path: Path) -> None:
    data, whole = path.read_bytes(), ends(path)
    for at in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            if at >= whole[-2]:
                trajectory = parse(bytes(flipped))
                assert trajectory.fingerprint is None
                assert trajectory.torn_bytes == len(data) - whole[-2]
                continue
            with pytest.raises(TrajectoryError):
                parse(bytes(flipped))


def test_records_of_another_place_or_file_do_not_pass(path: Path, tmp_path: Path) -> None:
    data, whole = path.read_bytes(), ends(path)
    moved = data[: whole[2]] + data[whole[1] : whole[2]] + data[whole[2] :]
    assert parse(moved).next_step == 2, "nothing after the moved record is in its place"
    record(tmp_path / "other.zot", make_table(WEIGHTS), make_updates(12, Random(99)), "gaussian")
    other = (tmp_path / "other.zot").read_bytes()
    start = ends(tmp_path / "other.zot")[0]
    assert start == whole[0]
    assert parse(other[:start] + data[start:]).next_step == 0


def test_a_tail_of_zeros_is_ignored(path: Path) -> None:
    data = path.read_bytes()
    trajectory = parse(data + bytes(5000))
    assert (trajectory.size, trajectory.torn_bytes) == (len(data), 5000)
    assert trajectory.fingerprint is not None


def valid(path: Path, body: bytes, at: int | None = None) -> bytes:
    """The file with one more record, whose CRC is right."""
    data = path.read_bytes()
    end = len(data) if at is None else at
    return data[:end] + frame(body, end, parse(data).salt)


RUN = b"\x01\x01\x00\x01\x00"  # one run: this step's seed, samples from 0, 1 of them, 1 seed


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"\x00", "unknown kind 0"),
        (b"\x41" + RUN + bytes(12), "unknown kind 65"),
        (b"\x06", "unknown kind 6"),
        (b"\x21" + bytes(4), "has no pattern"),
        (b"\x25" + RUN + bytes(3), "coefficients needs 4 bytes but 3 are left"),
        (b"\x25" + RUN + bytes(5), "1 bytes follow"),
        (b"\x05" + RUN + bytes(8), "coefficients needs 12 bytes but 8 are left"),
        (b"\x25" + RUN + struct.pack("<f", float("nan")), "not all finite"),
        (b"\x35" + RUN + struct.pack("<ff", float("inf"), 1.0), "not all finite"),
        (b"\x25\x01\x02\x00\x01\x00" + bytes(4), "step 0 has terms of steps -1 to -1"),
        (b"\x25\x01\x01\x00\x01\x02" + bytes(8), "step 0 has terms of steps 0 to 1"),
        (b"\x25\x01\x01\x00\x00\x00", "0 samples from 0"),
        (b"\x25\x01\x01" + varint((1 << 31) - 1) + b"\x02\x00" + bytes(8), "2 samples from"),
        (b"\x25\x01\x01\x00" + varint(1 << 20) + b"\x02", "2097152 terms; at most"),
        (b"\x25\x01\x01\x00" + varint(1 << 20) + b"\x00", "coefficients needs"),
        (b"\x25" + varint(1 << 60), "seed of a run needs 1 bytes"),
        (b"\x02\x00", "1 bytes follow"),
        (b"\x03" + bytes(7), "fingerprint needs 8 bytes"),
    ],
)
def test_whole_records_that_make_no_sense_are_refused(
    tmp_path: Path, body: bytes, told: str
) -> None:
    path = tmp_path / "run.zot"
    TrajectoryWriter.create(path, make_table(WEIGHTS), 1, "gaussian", "nearest").close()
    tracemalloc.start()
    try:
        with pytest.raises(TrajectoryError, match=f"offset [0-9]+, step 0: .*{told}"):
            parse(valid(path, body))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20, "refused before it is allocated"
    finally:
        tracemalloc.stop()


def test_nothing_follows_the_footer(path: Path) -> None:
    with pytest.raises(TrajectoryError, match="a record after the last one"):
        parse(valid(path, b"\x02"))


def test_a_header_is_not_unpacked_further_than_it_says(path: Path) -> None:
    data = path.read_bytes()
    header, end = decode_header(data)
    bomb = zlib.compress(bytes(1 << 26), 9)
    fixed = bytearray(data[:FIXED_BYTES])
    struct.pack_into("<II", fixed, len(fixed) - 12, 1000, len(bomb))
    crc = zlib.crc32(fixed[:-4])
    struct.pack_into("<I", fixed, len(fixed) - 4, crc)
    tracemalloc.start()
    try:
        with pytest.raises(TrajectoryError, match="should have 1000 bytes"):
            decode_header(bytes(fixed) + bomb + struct.pack("<I", zlib.crc32(bomb, crc)))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert header.num_groups == GROUPS
    assert end > len(fixed)


def test_other_files_are_told(tmp_path: Path) -> None:
    for data in (b"", b"x", b"ZORBALOG" + bytes(100), b"safetensors"):
        (tmp_path / "x.zot").write_bytes(data)
        with pytest.raises(TrajectoryError, match="no trajectory"):
            Trajectory.read(tmp_path / "x.zot")
    with pytest.raises(TrajectoryError, match="cannot be read"):
        Trajectory.read(tmp_path / "missing.zot")
