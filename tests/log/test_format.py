"""The bytes: what was appended comes back, and damage is told, never replayed."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zorba.log import Log, LogEntry, LogError, LogFile, TrajectoryWriter
from zorba.log.binary import END, ENTRY, SKIP, Reader, frame, varint
from zorba.log.header import decode_header
from zorba.optim import NoiseTerms, step_seed

import zorba_kernels as zk
from tests.conftest import Random
from tests.log import world
from tests.log.world import BLOCKS, RUN_SEED, assert_comes_back, ends, make_table


def test_header_comes_back(tmp_path: Path) -> None:
    told = {"lr": 1e-6, "name": "größer", "list": [1, None, True]}
    path, table, seed = tmp_path / "runs" / "run.zot", make_table(), (1 << 64) - 1
    writer = TrajectoryWriter.create(path, table, seed, *world.LAW, settings=told, first_step=40)
    writer.close()
    log = Log.read(path)
    header, identity = log.header, log.header.identity
    assert header == writer.log.header
    assert [(p.name, p.group, p.shape, p.dtype) for p in header.parameters] == [
        (e.name, e.group, tuple(e.tensor.shape), "bfloat16") for e in table.entries
    ]
    assert (identity.start, identity.origin) == (zk.fingerprint(table), None)
    assert (header.settings, header.first, header.run_seed) == (told, 40, seed)
    assert (log.num_steps, log.last, log.size) == (0, 39, path.stat().st_size)
    assert list(log.entries()) == []


def test_steps_come_back(tmp_path: Path, rng: Random) -> None:
    updates = world.make_updates(300, rng)
    entries = Log.read(world.record(tmp_path / "run.zot", make_table(), updates)).entries()
    for number, (entry, update) in enumerate(zip(entries, updates, strict=True)):
        assert entry.empty == (update is None)
        if update is not None:
            terms, rounding_seed, decay = update
            seed = rounding_seed if rounding_seed is not None else next(iter(terms.seeds), 0)
            world.assert_same_entry(entry, LogEntry(number, terms, seed, decay))


@settings(deadline=None)
@given(
    step=st.integers(0, 60),
    run_seed=st.sampled_from([RUN_SEED, None]),
    terms=st.lists(st.tuples(st.integers(0, 62), st.integers(0, 3)), max_size=30),
    high=st.integers(0, (1 << 31) - 4),
)
def test_any_terms_come_back(
    step: int, run_seed: int | None, terms: list[tuple[int, int]], high: int
) -> None:
    """Seeds of later steps than the entry's are foreign to it."""
    seeds = tuple(step_seed(RUN_SEED, at) for at, _ in terms)
    samples = tuple(high + sample for _, sample in terms)
    noises = NoiseTerms(seeds, samples, torch.ones(2, len(terms)))
    assert_comes_back(LogEntry(step, noises, 7, decay=torch.ones(2)), run_seed)


def test_momentum_takes_a_few_bytes() -> None:
    both = tuple(step_seed(RUN_SEED, s) for s in range(1000, 1050) for _ in range(2))
    terms = NoiseTerms(both, (0, 1) * 50, torch.ones(1, 100))
    data = assert_comes_back(LogEntry(1049, terms, both[-1]), RUN_SEED)
    assert bytes.fromhex("0132000232") in data, "as in docs/log.md"


def test_hundreds_of_terms_each_with_its_mask(rng: Random) -> None:
    """Own directions: eight clients of forty terms each, which move that client's blocks."""
    coefs = torch.zeros(BLOCKS, 320)
    for client in range(8):
        covered = torch.tensor([(client >> b) & 1 or b == client % BLOCKS for b in range(BLOCKS)])
        coefs[covered, 40 * client : 40 * client + 40] = rng.coefs(40)
    entry = LogEntry(3, NoiseTerms((7,) * 320, tuple(range(320)), coefs), 7, None, 1, 2)
    data = assert_comes_back(entry)
    assert entry.scalar_bytes == 4 * 320 + 8
    assert len(data) < 4 * 320 + 8 * 10 + 64, "a column of coefficients and a mask for each client"


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80\x00", b"\xff" * 9 + b"\x01"])
def test_a_number_has_one_form(data: bytes) -> None:
    largest = (1 << 63) - 1
    assert Reader(memoryview(varint(largest))).varint("it") == largest
    with pytest.raises(LogError):
        Reader(memoryview(data)).varint("it")


def test_a_thousand_steps_take_twenty_kilobytes(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(272)]
    groups = {name: i % 30 for i, name in enumerate(names)}
    table = zk.ParamTable({name: torch.full((2,), 0.1) for name in names}, groups)
    path = tmp_path / "run.zot"
    with TrajectoryWriter.create(path, table, 3, *world.LAW) as writer:
        header = writer.log.size
        for step in range(1000):
            coefs = torch.full((30, 1), float(step) + 0.5)
            writer.append(step, NoiseTerms.single(step_seed(3, step), 0, coefs))
    assert path.stat().st_size == writer.log.size <= min(20_000, header + 1000 * 16)
    assert header < 2000


# --- Damage --------------------------------------------------------------------------------------


def test_every_truncation_leaves_a_prefix_that_goes_on(either: Path, tmp_path: Path) -> None:
    data, whole, cut = either.read_bytes(), ends(either), tmp_path / "cut.log"
    header = Log(data).header
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        kept = max(sum(end <= length for end in whole) - 1, 0)
        last, torn = header.first + kept - 1, length - whole[kept] if length >= whole[0] else 0
        if length < whole[0]:
            with pytest.raises(LogError, match=r"cut.log: .*"):
                Log.read(cut)
        else:
            log = Log.read(cut)
            assert (log.last, log.size, log.torn_bytes) == (last, whole[kept], torn)
            assert log.fingerprint is None
            assert cut.read_bytes() == data[:length], "reading changes nothing"
        with LogFile(cut, header, durable=False) as file:  # a header cut short is written again
            assert (file.last, file.torn_bytes) == (last, torn)
            file.append(LogEntry(last + 1, NoiseTerms.none(header.num_groups), 0))
        again = Log.read(cut)
        assert (again.last, again.torn_bytes) == (last + 1, 0)
        assert cut.read_bytes()[: whole[kept]] == data[: whole[kept]]


def test_a_flipped_bit_is_told_or_cuts_the_end(either: Path, tmp_path: Path, rng: Random) -> None:
    data, whole, flipped = either.read_bytes(), ends(either), tmp_path / "flipped.log"
    header = Log(data).header
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << rng.integer(3)
        if at >= whole[-2]:
            log = Log(bytes(changed))
            assert (log.fingerprint, log.torn_bytes) == (None, len(data) - whole[-2])
            continue
        flipped.write_bytes(changed)
        with pytest.raises(LogError, match=r"flipped.log"):
            LogFile(flipped, header)
        assert flipped.read_bytes() == changed


def test_what_is_in_a_wrong_place_does_not_pass(path: Path) -> None:
    data, whole = path.read_bytes(), ends(path)
    moved = data[: whole[2]] + data[whole[1] : whole[2]] + data[whole[2] :]
    with pytest.raises(LogError, match="it is entry 1, expected 2"):
        Log(moved)
    assert Log(world.HEADER.encode() + data[whole[0] :]).last == 0
    with pytest.raises(LogError, match="an entry after the end"):
        Log(valid(data, SKIP, b""))
    zeros = Log(data + bytes(5000))
    assert (zeros.last, zeros.size, zeros.torn_bytes) == (7, len(data), 5000)


def test_a_crafted_tail_costs_no_quadratic_time(path: Path) -> None:
    """Heads that pass their check, each with a long body: bytes read are counted, not seconds."""
    body = bytes(60_000)
    head = frame(ENTRY, 8, body, Log.read(path).header.log_id)[: -len(body) - 4]
    with pytest.raises(LogError, match="neither whole nor torn"):
        Log(path.read_bytes() + b"\x01" + head * 20_000 + body)


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 1 << 20, "refused before it is allocated"
    finally:
        tracemalloc.stop()


def valid(data: bytes, kind: int, body: bytes) -> bytes:
    """The file with one more entry, whose CRC is right."""
    log = Log(data)
    return data + frame(kind, log.last + 1, body, log.header.log_id)


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
    path: Path, kind: int, body: bytes, told: str
) -> None:
    data = valid(Log.read(path).header.encode(), kind, body)
    with little_memory(), pytest.raises(LogError, match=f"offset [0-9]+, entry 0: .*{told}"):
        Log(data)


def forge(text: bytes, size: int) -> bytes:
    """A header of this text, whose CRC is right."""
    packed = zlib.compress(text, 9)
    data = world.HEADER.encode()[:12] + struct.pack("<II", size, len(packed)) + packed
    return data + struct.pack("<I", zlib.crc32(data))


def test_a_header_is_not_unpacked_further_than_it_says() -> None:
    bomb = forge(bytes(1 << 26), 1000)
    with little_memory(), pytest.raises(LogError, match="should have 1000 bytes"):
        decode_header(bomb)


BAD_PARAMETERS = [[[[1]], ["int8"], [0]], [[[-1]], ["float16"], [0]], [[[1]], ["float16"], [9]]]


@pytest.mark.parametrize(
    ("field", "values", "told"),
    [
        ("log_id", [True, 1 << 64], "log_id must be a uint64"),
        ("first", [1.0, -1], "first must be a uint64"),
        ("run_seed", [[]], "run_seed must be a uint64"),
        ("identity", [{}, 1], "text makes no sense"),
        ("distribution", ["uniform"], "unknown noise 'uniform'"),
        ("settings", [[]], "settings are no mapping"),
        ("architecture", [[]], "a name is no text"),
        ("parameters", [[["w"], *p] for p in BAD_PARAMETERS], "no sense in a log of 4 groups"),
        ("noise_version", [2], "noise version 2, this package makes version 1"),
        ("unknown", [1], "text makes no sense"),
    ],
)
def test_headers_that_make_no_sense_are_refused(field: str, values: list[Any], told: str) -> None:
    right = json.loads(zlib.decompress(world.HEADER.encode()[20:-4]))
    for value in values:
        text = json.dumps(right | {field: value}).encode()
        with pytest.raises(LogError, match=told):
            decode_header(forge(text, len(text)))


def test_other_files_are_told(tmp_path: Path) -> None:
    for data in (b"", b"x", b"ZORBAL\0\0", b"safetensors"):
        with pytest.raises(LogError, match="no log"):
            Log(data)
    for old in (b"ZORBAZOT\1\0", b"ZORBALOG\1\0"):
        with pytest.raises(LogError, match=r"of version 0.1.0: read it with the package"):
            Log(old + bytes(100))
    with pytest.raises(LogError, match="cannot be read"):
        Log.read(tmp_path / "missing.zot")
