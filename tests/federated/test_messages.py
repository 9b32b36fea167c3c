"""Messages: they come back as they went, and whatever is wrong with them is a MessageError."""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zorba.federated import Greeting, Hello, MessageError, ModelIdentity, Plan, Reply, decode
from zorba.federated.codec import HEADER_BYTES, frame
from zorba.federated.settings import MAX_STEPS
from zorba.log import encode_entry

from tests.federated.world import make_entry, make_replica

JOB = 1 << 63


def make_plan() -> Plan:
    """A plan with two log entries, the second of them empty."""
    entries = make_entry(3, blocks=5), make_entry(4, blocks=5, columns=0)
    return Plan(
        job=JOB,
        round=5,
        base_round=2,
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
        num_entries=2,
        frames=b"".join(encode_entry(entry, JOB) for entry in entries),
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


def taken(data: bytes) -> bool:
    """Whether bytes are a message. One that is has one form only; anything else is refused."""
    try:
        message = decode(data)
    except MessageError:
        return False
    assert message.encode() == data
    return True


# --- Messages that are well formed ----------------------------------------------------------------


@pytest.mark.parametrize("kind", MESSAGES)
def test_comes_back_as_it_went(kind: str) -> None:
    data = MESSAGES[kind].encode()
    assert type(decode(data)) is type(MESSAGES[kind])
    assert taken(data)


U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
NAMES = st.text("AZaz09._+-", min_size=1, max_size=64)
DISTRIBUTIONS = st.sampled_from(["gaussian", "rademacher"])
ROUNDINGS = st.sampled_from(["nearest", "stochastic"])
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
PLANS: Any = st.builds(
    Plan,
    job=U64,
    round=st.integers(1, (1 << 32) - 1),
    base_round=st.just(0),
    seeds=st.lists(U64, max_size=5).map(tuple),
    num_perturbations=st.integers(1, MAX_STEPS),
    eps=st.floats(1e-30, 1e30),
    estimator=st.sampled_from(["central", "forward"]),
    distribution=DISTRIBUTIONS,
    rounding=ROUNDINGS,
    mask=st.lists(st.booleans(), min_size=1, max_size=40).map(tuple),
    mask_version=U32,
    local_lr=st.floats(0, 1e30),
    clip=st.just(math.inf) | st.floats(1e-30, 1e30),
)
HELLOS: Any = st.builds(
    Hello,
    client=NAMES,
    job=U64,
    identity=st.builds(ModelIdentity, U64, U64, U64, U64, st.integers(1, 65534)),
    distribution=DISTRIBUTIONS,
    rounding=ROUNDINGS,
    applied_round=U32,
    fingerprint=U64,
    package=NAMES,
)


@settings(max_examples=200, deadline=None)
@given(st.builds(Greeting, U64) | PLANS | HELLOS)
def test_any_sound_message_comes_back(message: Greeting | Plan | Hello) -> None:
    assert decode(message.encode()) == message


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 4), st.integers(1, 6), FLOATS, FLOATS, U32, NAMES)
def test_any_sound_reply_comes_back(
    steps: int, samples: int, scalar: float, loss: float, examples: int, name: str
) -> None:
    reply = replace(make_reply(steps, samples), client=name, num_examples=examples, loss=loss)
    reply.scalars[...] = scalar
    back = decode(reply.encode())
    assert isinstance(back, Reply)
    assert back.scalars.tobytes() == reply.scalars.tobytes()
    assert (back.client, back.num_examples, back.loss) == (name, examples, loss)
    assert taken(reply.encode())


def test_a_plan_carries_its_entries() -> None:
    plan = decode(make_plan().encode())
    assert plan == make_plan()
    assert isinstance(plan, Plan)
    sent = make_entry(3, blocks=5)
    assert [entry.number for entry in plan.entries] == [3, 4]
    assert plan.entries[0].terms.coefs.tolist() == sent.terms.coefs.tolist()
    assert plan.entries[0].base == sent.base
    assert plan.entries[1].empty


def test_plans_of_many_clients_are_the_plan_with_each_mask() -> None:
    plan = make_plan()
    masks = np.array([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0], [1, 0, 1, 1, 0]], bool)
    each = [replace(plan, mask=tuple(mask.tolist())).encode() for mask in masks]
    assert plan.encode_each(masks) == each


def test_scalars_of_a_reply_are_20_bytes() -> None:
    reply = make_reply(steps=1, samples=5)
    assert reply.scalar_bytes == 20
    assert len(reply.encode()) <= 80, "the whole message"


# --- Damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MESSAGES)
def test_every_truncation_and_every_flipped_bit_is_refused(kind: str) -> None:
    data = MESSAGES[kind].encode()
    assert not any(taken(data[:length]) for length in range(len(data)))
    assert not taken(data + b"\0")
    for at in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        assert not taken(bytes(flipped)), at


def sealed(data: bytes) -> bytes:
    """The message with a length and CRC that fit, as a hostile sender makes them."""
    head = data[:8] + struct.pack("<I", len(data))
    payload = data[HEADER_BYTES:]
    return head + struct.pack("<I", zlib.crc32(payload, zlib.crc32(head))) + payload


@pytest.mark.parametrize("kind", MESSAGES)
def test_hostile_bytes_are_a_message_or_a_message_error(kind: str) -> None:
    """Fields of any value are taken, sizes and codes that do not fit are refused."""
    data = MESSAGES[kind].encode()
    told = []
    for at in range(4, len(data)):
        for value in {0, 1, 0x7F, 0x80, 0xFF, data[at] ^ 0x55} - {data[at]}:
            told.append(taken(sealed(data[:at] + bytes([value]) + data[at + 1 :])))
    # A quarter: ids, fingerprints, seeds and scalars are most of a message, and any bits will do.
    # A plan's entries have CRCs of their own, and so do their ids.
    assert told.count(True) > len(told) / (12 if kind == "plan" else 4)
    assert told.count(False) > len(told) / 50
    for length in range(HEADER_BYTES, len(data)):
        assert not taken(sealed(data[:length]))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 6), st.binary(max_size=300))
def test_random_payloads_are_refused_but_for_greetings(kind: int, payload: bytes) -> None:
    greeting = kind == Greeting.KIND and len(payload) == 8
    if kind == Greeting.KIND or len(payload) < 40:  # a longer one might be a message, by chance
        assert taken(frame(kind, payload)) == greeting
    else:
        taken(frame(kind, payload))


def test_errors_say_what_was_expected() -> None:
    data = make_reply().encode()
    with pytest.raises(MessageError, match="schema 9, expected 2"):
        decode(sealed(data[:4] + struct.pack("<H", 9) + data[6:]))
    with pytest.raises(MessageError, match="kind 200"):
        decode(sealed(data[:6] + b"\xc8" + data[7:]))
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
        decode(sealed(bytes(data)))


def test_sizes_that_promise_more_than_there_is_allocate_nothing() -> None:
    data = bytearray(make_reply().encode())
    struct.pack_into("<HH", data, HEADER_BYTES + 16, 65535, 65535)  # K, P: 17 GB of scalars
    with pytest.raises(MessageError, match="scalars needs"):
        decode(sealed(bytes(data)))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"round": 4}, "the log of rounds before 4, got 4"),
        ({"base_round": 1}, "expected entry 2, found 3"),
        ({"num_entries": 1}, "follow the last of 1"),
        ({"job": 4}, "log entries of a plan"),
        ({"mask": (True,)}, "log entries of a plan"),
        ({"mask": ()}, "blocks"),
        ({"num_perturbations": 0}, "perturbations"),
        ({"eps": 1e-300}, "eps"),
        ({"local_lr": -1.0}, "local_lr"),
        ({"local_lr": math.inf}, "local_lr"),
        ({"clip": 0.0}, "clip"),
        ({"seeds": (1,) * (MAX_STEPS + 1)}, "local steps"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_plan_whose_parts_do_not_fit_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(MessageError, match=told):
        decode(replace(make_plan(), **change).encode())
