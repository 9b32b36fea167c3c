"""Messages: they come back as they went, and whatever is wrong with them is a MessageError."""

from __future__ import annotations

import contextlib
import math
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zorba.federated import Greeting, Hello, LogEntry, MessageError, Plan, Reply, decode
from zorba.federated.codec import HEADER_BYTES, frame
from zorba.federated.entry import RECORD_HEAD_BYTES, UNCOVERED, decode_entry
from zorba.federated.errors import DamagedError

from tests.federated.world import make_replica


def make_entry(
    round_number: int = 1, blocks: int = 5, columns: int = 2, steps: int = 1
) -> LogEntry:
    """An entry with one uncovered block."""
    rng = np.random.default_rng(round_number)
    index = (np.arange(blocks) % columns).astype(np.int32) if columns else np.zeros(blocks, "i4")
    index[-1] = UNCOVERED
    if not columns:
        index[:] = UNCOVERED
    return LogEntry(
        round=round_number,
        seeds=tuple(int(s) for s in rng.integers(0, 1 << 63, steps)),
        coefs=rng.normal(size=(steps, 5, columns)).astype(np.float32),
        columns=index,
        rounding_seed=(1 << 64) - round_number,
        mask_version=0xFFFFFFFF,
        base_fingerprint=123456789 + round_number,
        distribution="rademacher",
        rounding="stochastic",
    )


def make_plan() -> Plan:
    """A plan with two log entries."""
    return Plan(
        job=1 << 63,
        round=5,
        base_round=2,
        entries=(make_entry(3), make_entry(4, columns=0)),
        seeds=(5, (1 << 64) - 1),
        num_perturbations=3,
        eps=1e-3,
        estimator="forward",
        distribution="gaussian",
        rounding="nearest",
        mask=(True, False, True, True, False),
        mask_version=9,
        local_lr=0.1,
        clip=2.5,
    )


def make_reply(steps: int = 1, samples: int = 5) -> Reply:
    """A reply with scalars of the given shape."""
    scalars = np.arange(steps * samples, dtype=np.float32).reshape(steps, samples)
    return Reply(
        job=77,
        round=5,
        client="ada",
        applied_round=4,
        fingerprint=(1 << 64) - 3,
        scalars=scalars,
        num_examples=16,
        loss=0.5,
    )


def make_hello() -> Hello:
    """A hello of a small model."""
    return Hello(
        client="ada",
        job=3,
        identity=make_replica().identity,
        distribution="gaussian",
        rounding="stochastic",
        applied_round=12,
        fingerprint=99,
        package="0.1.0",
    )


MESSAGES = {
    "greeting": Greeting((1 << 64) - 1),
    "hello": make_hello(),
    "plan": make_plan(),
    "reply": make_reply(2),
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_comes_back_as_it_went(kind: str) -> None:
    data = MESSAGES[kind].encode()
    assert type(decode(data)) is type(MESSAGES[kind])
    assert decode(data).encode() == data


def test_plan_keeps_its_fields() -> None:
    plan, back = make_plan(), decode(make_plan().encode())
    assert isinstance(back, Plan)
    assert replace(back, entries=()) == replace(plan, entries=(), base_round=2)
    assert [e.record for e in back.entries] == [e.record for e in plan.entries]


def test_plans_of_many_clients_are_the_plan_with_each_mask() -> None:
    plan = make_plan()
    masks = np.array([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0], [1, 0, 1, 1, 0]], bool)
    records = b"".join(entry.record for entry in plan.entries)
    made = replace(plan, entries=()).encode_each(masks, len(plan.entries), records)
    each = [replace(plan, mask=tuple(mask.tolist())).encode() for mask in masks]
    assert made == each


@pytest.mark.parametrize("kind", MESSAGES)
def test_every_truncation_is_refused(kind: str) -> None:
    data = MESSAGES[kind].encode()
    for length in range(len(data)):
        with pytest.raises(MessageError):
            decode(data[:length])
    with pytest.raises(MessageError):
        decode(data + b"\0")


@pytest.mark.parametrize("kind", MESSAGES)
def test_every_flipped_bit_is_refused(kind: str) -> None:
    data = bytearray(MESSAGES[kind].encode())
    for at in range(len(data)):
        for bit in range(8):
            data[at] ^= 1 << bit
            with pytest.raises(MessageError):
                decode(bytes(data))
            data[at] ^= 1 << bit


def test_a_head_and_a_body_of_two_entries_are_no_entry() -> None:
    one, other = make_entry(1).record, make_entry(2).record
    assert len(one) == len(other)
    with pytest.raises(DamagedError, match="CRC"):
        decode_entry(one[:RECORD_HEAD_BYTES] + other[RECORD_HEAD_BYTES:])


def with_crc(data: bytes) -> bytes:
    """The message with a length and CRC that fit, as a hostile sender makes them."""
    head = data[:8] + struct.pack("<I", len(data))
    payload = data[HEADER_BYTES:]
    return head + struct.pack("<I", zlib.crc32(payload, zlib.crc32(head))) + payload


@pytest.mark.parametrize("kind", MESSAGES)
def test_hostile_bytes_are_a_message_or_a_message_error(kind: str) -> None:
    data = MESSAGES[kind].encode()
    for at in range(4, len(data)):
        for value in (0, 1, 0x7F, 0x80, 0xFF, data[at] ^ 0x55):
            hostile = with_crc(data[:at] + bytes([value]) + data[at + 1 :])
            with contextlib.suppress(MessageError):
                assert decode(hostile).encode() == hostile
    for length in range(HEADER_BYTES, len(data)):
        with pytest.raises(MessageError):
            decode(with_crc(data[:length]))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 6), st.binary(max_size=300))
def test_random_payloads_are_a_message_or_a_message_error(kind: int, payload: bytes) -> None:
    with contextlib.suppress(MessageError):
        decode(frame(kind, payload))


def test_errors_say_what_was_expected() -> None:
    data = make_reply().encode()
    with pytest.raises(MessageError, match="schema 9, expected 1"):
        decode(with_crc(data[:4] + struct.pack("<H", 9) + data[6:]))
    with pytest.raises(MessageError, match="kind 200"):
        decode(with_crc(data[:6] + b"\xc8" + data[7:]))
    with pytest.raises(MessageError, match="starts with"):
        decode(b"GET / HTTP/1.1\r\n")
    with pytest.raises(MessageError, match="send it again"):
        decode(data[:-1])
    with pytest.raises(MessageError, match="bytes, got str"):
        decode("reply")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_scalar_is_refused(value: float) -> None:
    data = bytearray(make_reply().encode())
    at = data.index(struct.pack("<f", 3.0))  # the fourth scalar
    data[at : at + 4] = struct.pack("<f", value)
    with pytest.raises(MessageError, match="scalars of ada in round 5 must be finite"):
        decode(with_crc(bytes(data)))


def test_sizes_that_promise_more_than_there_is_allocate_nothing() -> None:
    data = bytearray(make_reply().encode())
    struct.pack_into("<HH", data, HEADER_BYTES + 16, 65535, 65535)  # K, P: 17 GB of scalars
    with pytest.raises(MessageError, match="scalars needs"):
        decode(with_crc(bytes(data)))


def test_scalars_of_a_reply_are_20_bytes() -> None:
    reply = make_reply(steps=1, samples=5)
    assert reply.scalar_bytes == 20
    assert len(reply.encode()) <= 80, "the whole message"


def test_plan_with_a_gap_or_too_much_log_is_refused() -> None:
    with pytest.raises(MessageError, match="entry 1 of the plan is of round 5, expected 4"):
        replace(make_plan(), entries=(make_entry(3), make_entry(5)))
    with pytest.raises(MessageError, match="must end before"):
        replace(make_plan(), round=4)


@pytest.mark.parametrize("columns", [0, 1, 32, 254, 255, 300])
def test_entry_comes_back_as_it_went(columns: int) -> None:
    entry = make_entry(blocks=max(columns + 1, 4), columns=columns, steps=3)
    back = decode_entry(entry.record)
    assert back.record == entry.record
    assert back.columns.tolist() == entry.columns.tolist()
    assert back.coefs.tobytes() == entry.coefs.tobytes()
    assert (back.round, back.seeds, back.rounding_seed) == (
        entry.round,
        entry.seeds,
        entry.rounding_seed,
    )
    assert back.base_fingerprint == entry.base_fingerprint


def test_entry_of_32_blocks_and_full_diversity_is_under_1_kb() -> None:
    entry = make_entry(blocks=32, columns=32)
    assert len(entry.record) == 732, "as docs/protocol.md has it"
    assert entry.scalar_bytes == 32 * 5 * 4 + 8


def test_block_coefs_follow_the_columns() -> None:
    entry = make_entry(blocks=5, columns=2, steps=2)
    rows = entry.block_coefs()
    assert rows.shape == (5, 10)
    assert rows[2].tolist() == entry.coefs[:, :, 0].reshape(-1).tolist()
    assert (rows[4] == 0).all(), "uncovered"


def test_non_finite_coefs_make_no_entry() -> None:
    entry = make_entry()
    bad = entry.coefs.copy()
    bad[0, 0, 0] = np.nan
    with pytest.raises(MessageError, match="finite"):
        replace(entry, coefs=bad)
