"""Messages: they come back as they went, and whatever is wrong with them is a MessageError."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zorba.federated import Greeting, Hello, MessageError, ModelIdentity, Plan, Reply, decode
from zorba.federated.codec import HEADER_BYTES
from zorba.federated.privacy import PrivacySpent
from zorba.federated.settings import MAX_STEPS
from zorba.log import encode_entry

from tests.federated.fuzz import sealed
from tests.federated.world import make_entry, make_replica, plan_of, reply_of

JOB = 1 << 63
SPENT = PrivacySpent("example", 2.5, 1e-5)
ENTRIES = make_entry(3, blocks=5), make_entry(4, blocks=5, columns=0)


PLAN = Plan(  # with two log entries, the second of them empty
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
    frames=b"".join(encode_entry(entry, JOB) for entry in ENTRIES),
)


def make_reply(steps: int = 1, samples: int = 5) -> Reply:
    scalars = np.arange(steps * samples, dtype=np.float32).reshape(steps, samples)
    return Reply(77, 5, "ada", 4, (1 << 64) - 3, scalars, num_examples=16, loss=0.5)


MESSAGES = {
    "greeting": Greeting((1 << 64) - 1),
    "hello": Hello("ada", 3, make_replica().identity, "gaussian", "stochastic", 12, 99, "0.1.0"),
    "plan": PLAN,
    "reply": make_reply(2),
    "private reply": replace(make_reply(), loss=math.nan, privacy=SPENT),
}


def taken(data: bytes) -> bool:
    """Whether bytes are a message. One that is has one form only; anything else is refused."""
    try:
        message = decode(data)
    except MessageError:
        return False
    assert message.encode() == data
    return True


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
IDENTITIES = st.builds(ModelIdentity, U64, U64, U64, U64, st.integers(1, 65534))
HELLOS: Any = st.builds(Hello, NAMES, U64, IDENTITIES, DISTRIBUTIONS, ROUNDINGS, U32, U64, NAMES)


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
    back = reply_of(reply.encode())
    assert back.scalars.tobytes() == reply.scalars.tobytes()
    assert (back.client, back.num_examples, back.loss) == (name, examples, loss)
    assert taken(reply.encode())


def test_a_plan_carries_its_entries() -> None:
    plan = plan_of(PLAN.encode())
    assert plan == PLAN
    first, second = plan.entries
    assert (first.number, second.number, second.empty) == (3, 4, True)
    assert first.terms.coefs.tolist() == ENTRIES[0].terms.coefs.tolist()
    assert first.base == ENTRIES[0].base


def test_plans_of_many_clients_are_the_plan_with_each_mask() -> None:
    masks = np.array([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0], [1, 0, 1, 1, 0]], bool)
    plan, firsts = replace(PLAN, directions="own"), [0, 7, 1 << 30]
    each = [
        replace(plan, mask=tuple(mask), first_sample=first).encode()
        for mask, first in zip(masks.tolist(), firsts, strict=True)
    ]
    assert plan.encode_each(masks, firsts) == each
    together = plan.encode_each(masks, [0, 0, 0])
    assert together[0] is together[2], "clients that are asked the same share a message"


@pytest.mark.parametrize("kind", MESSAGES)
def test_comes_back_and_every_truncation_and_flipped_bit_is_refused(kind: str) -> None:
    data = MESSAGES[kind].encode()
    assert type(decode(data)) is type(MESSAGES[kind])
    assert taken(data)
    assert not any(taken(data[:length]) for length in range(len(data)))
    assert not taken(data + b"\0")
    for at in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        assert not taken(bytes(flipped)), at


# Without a private reply: its loss is nan, which has more than one form.
@pytest.mark.parametrize("kind", ["greeting", "hello", "plan", "reply"])
def test_hostile_bytes_are_a_message_or_a_message_error(kind: str) -> None:
    """Fields of any value are taken, sizes and codes that do not fit are refused."""
    data = MESSAGES[kind].encode()
    told = []
    for at in range(6, len(data)):
        for value in {0, 1, 0x7F, 0x80, 0xFF, data[at] ^ 0x55} - {data[at]}:
            told.append(taken(sealed(data[:at] + bytes([value]) + data[at + 1 :])))
    # A quarter: ids, fingerprints, seeds and scalars are most of a message, and any bits will do.
    # A plan's entries have CRCs of their own, and so do their ids.
    assert told.count(True) > len(told) / (12 if kind == "plan" else 4)
    assert told.count(False) > len(told) / 50
    assert not any(taken(sealed(data[:length])) for length in range(HEADER_BYTES, len(data)))


REPLY = make_reply().encode()
FOURTH = REPLY.index(struct.pack("<f", 3.0))  # scalar


def put(at: int, *parts: bytes) -> bytes:
    """The reply with other bytes at a place, and a length and CRC that fit."""
    changed = b"".join(parts)
    return sealed(REPLY[:at] + changed + REPLY[at + len(changed) :])


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (REPLY[:4] + struct.pack("<H", 9) + REPLY[6:], "schema 9, expected 3"),
        (put(6, b"\xc8"), "kind 200"),
        (b"GET / HTTP/1.1\r\n", "starts with"),
        (b"", "at least 16 bytes, got 0"),
        (REPLY[:-1], "send it again"),
        ("reply", "bytes, got str"),
        (put(HEADER_BYTES + 16, b"\xff" * 4), "scalars needs"),  # K, P: 17 GB, never allocated
        *(
            (put(FOURTH, struct.pack("<f", value)), "scalars of ada in round 5 must be finite")
            for value in (math.nan, math.inf, -math.inf)
        ),
    ],
    ids=["schema", "kind", "magic", "empty", "cut", "text", "sizes", "nan", "inf", "-inf"],
)
def test_errors_say_what_was_expected(data: Any, told: str) -> None:
    with pytest.raises(MessageError, match=told):
        decode(data)


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
        decode(replace(PLAN, **change).encode())
