"""The four messages between server and clients; ``docs/protocol.md`` has them byte for byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from zorba.defaults import Directions, Estimator
from zorba.federated.codec import Layout, Reader, check_name, frame, pack_name, unframe
from zorba.federated.errors import MessageError
from zorba.federated.privacy import PrivacySpent
from zorba.federated.settings import MAX_STEPS, positive_in_float32
from zorba.identity import MAX_BLOCKS, ModelIdentity
from zorba.log import LogEntry, LogError, decode_entries
from zorba_kernels.noise import ROUNDING_DOMAIN, VERSIONS, Distribution, Rounding

# A field of fixed size is named here and in its message's class, and nowhere else. The codes are
# those of the module struct: Q is a uint64, I a uint32, H a uint16, B a uint8, d and f are floats.
_GREETING = Layout("greeting", "job:Q")
_HELLO = Layout(
    "hello",
    "job:Q noise_version:B distribution:B rounding:B applied_round:I fingerprint:Q "
    "origin:Q start:Q layout:Q num_weights:Q num_blocks:H",
)
_PLAN = Layout(
    "plan",
    "job:Q round:I base_round:I mask_version:I noise_version:B estimator:B distribution:B "
    "rounding:B directions:B steps:H num_perturbations:H blocks:H eps:d local_lr:d clip:d "
    "num_entries:I",
)
_FIRST = Layout("plan", "first_sample:I")
_REPLY = Layout(
    "reply",
    "job:Q round:I applied_round:I steps:H samples:H num_examples:I loss:f fingerprint:Q unit:B",
)
_PRIVACY = Layout("privacy", "epsilon:d delta:d")


@dataclass(frozen=True)
class Greeting:
    """Server to a client that it does not know: which job this is. The answer is a Hello."""

    KIND: ClassVar[int] = 1
    job: int

    def encode(self) -> bytes:
        """Returns the message."""
        return frame(self.KIND, _GREETING.pack(vars(self)))


@dataclass(frozen=True)
class Hello:
    """Client to server: who it is and what it holds. Also the answer to a plan it cannot follow."""

    KIND: ClassVar[int] = 2
    client: str
    job: int
    identity: ModelIdentity  # of its model at theta_0
    distribution: Distribution  # that its objective makes
    rounding: Rounding  # of its replica
    applied_round: int  # of its replica: it needs the log from the next one on
    fingerprint: int  # of its replica now
    package: str  # version of its package
    noise_version: int = -1  # of its kernels; -1: the one that defined the distribution

    def __post_init__(self) -> None:
        _set_version(self)

    def encode(self) -> bytes:
        """Returns the message."""
        # Names last: everything in front of them has a fixed place.
        names = pack_name(self.client, "client name") + pack_name(self.package, "package version")
        return frame(self.KIND, _HELLO.pack(vars(self) | vars(self.identity)) + names)


@dataclass(frozen=True)
class Plan:
    """Server to client: apply these log entries, then measure these directions."""

    KIND: ClassVar[int] = 3
    job: int
    round: int  # that is measured, at the weights that round - 1 left
    base_round: int  # that the server knows the client to have applied; entries start after it
    seeds: tuple[int, ...]  # uint64 [K], the same for all clients. None at all: only apply
    num_perturbations: int  # P, of this client
    eps: float  # distance of the evaluations
    estimator: Estimator
    distribution: Distribution  # of the noise, in the log entries too
    rounding: Rounding  # of 16-bit weights in entries
    mask: tuple[bool, ...]  # [blocks]: which of them this client perturbs
    mask_version: int  # of the masks of all clients
    local_lr: float  # learning rate of the local steps that ride along unwritten
    clip: float = math.inf  # largest absolute scalar in those local steps
    directions: Directions = "shared"  # "own": no other client measures these
    first_sample: int = 0  # of each seed; the client's directions are samples from here on
    num_entries: int = 0  # log entries that the plan carries
    frames: bytes = b""  # their bytes, one after the other, as they are in the log
    noise_version: int = -1  # as in ``Hello``

    def __post_init__(self) -> None:
        _set_version(self)
        steps, samples, blocks = len(self.seeds), self.num_perturbations, len(self.mask)
        before, reached, last = self.round, self.reached, self.first_sample + samples - 1
        for fits, wrong in (
            (steps <= MAX_STEPS, f"at most {MAX_STEPS} local steps, got {steps}"),
            (1 <= samples <= MAX_STEPS, f"1 to {MAX_STEPS} perturbations, got {samples}"),
            (1 <= blocks <= MAX_BLOCKS, f"1 to {MAX_BLOCKS} blocks, got {blocks}"),
            (positive_in_float32(self.eps), f"a positive, finite eps in float32, got {self.eps}"),
            (0 <= self.local_lr < math.inf, f"a finite local_lr from 0 on, got {self.local_lr}"),
            (self.clip > 0, f"a positive clip, got {self.clip}"),
            (0 <= self.first_sample <= last < ROUNDING_DOMAIN, f"samples below 2**31, got {last}"),
            (self.directions == "own" or not self.first_sample, "sample 0 first where all share"),
            (reached < before, f"the log of rounds before {before}, got {reached}"),
        ):
            if not fits:
                raise MessageError(f"a plan has {wrong}")

    @property
    def reached(self) -> int:
        """The last round that a client has applied once it followed the plan."""
        return self.base_round + self.num_entries

    @cached_property
    def entries(self) -> list[LogEntry]:
        """The log entries, of rounds ``base_round + 1`` to ``reached``."""
        # The log checks that they are of this job, without a gap, and undamaged. Their CRCs were
        # made by the server that wrote them, so a change on the way to the plan is found, too.
        wanted = (self.num_entries, self.base_round + 1, len(self.mask), self.job)
        try:
            return decode_entries(self.frames, *wanted)
        except LogError as error:
            raise MessageError(f"log entries of a plan: {error}") from None

    def encode(self) -> bytes:
        """Returns the message."""
        return self.encode_each(np.array([self.mask]), [self.first_sample])[0]

    def encode_each(
        self, masks: npt.NDArray[np.bool_], first_samples: Sequence[int]
    ) -> list[bytes]:
        """Returns this plan for many clients, with masks and first samples of their own.

        ``masks`` is bool [clients, blocks], ``first_samples`` [clients].
        """
        fixed = vars(self) | {"steps": len(self.seeds), "blocks": masks.shape[1]}
        head = _PLAN.pack(fixed) + np.array(self.seeds, "<u8").tobytes()
        firsts = [_FIRST.pack({"first_sample": first}) for first in first_samples]
        rows = np.packbits(masks, axis=1, bitorder="little")
        packed = [first + row.tobytes() for first, row in zip(firsts, rows, strict=True)]
        # Clients that are asked the same share one message: with thousands of them, each would take
        # its own copy of the log entries.
        made = {bits: frame(self.KIND, head + bits + self.frames) for bits in set(packed)}
        return [made[bits] for bits in packed]


@dataclass(frozen=True, eq=False)
class Reply:
    """Client to server: what it measured."""

    KIND: ClassVar[int] = 4
    job: int
    round: int  # of the plan
    client: str
    applied_round: int  # of the replica that was measured
    fingerprint: int  # of the replica that was measured
    scalars: npt.NDArray[np.float32]  # [K, P], finite
    num_examples: int  # in the batches of all local steps
    loss: float  # mean of the losses seen: telemetry, it decides nothing. nan where it is private
    privacy: PrivacySpent | None = None  # what its scalars have told so far; None without noise

    def __post_init__(self) -> None:
        check_name(self.client, "client name")
        if self.scalars.ndim != 2 or self.scalars.dtype != np.float32:
            raise MessageError(f"scalars must be float32 [K, P], got {self.scalars.shape}")
        # Checked here, so that neither side can make or take such a message: one nan in a sum of
        # thousands would be all that is left of it.
        if not np.isfinite(self.scalars).all():
            told = f"scalars of {self.client} in round {self.round} must be finite"
            raise MessageError(f"{told}: its loss overflowed or was no number")
        spent = self.privacy
        if spent is None and not math.isfinite(self.loss):
            raise MessageError(f"loss of {self.client} must be finite, got {self.loss}")
        # The accountant counts the scalars alone: an exact loss beside them would undo them.
        if spent is not None and not math.isnan(self.loss):
            raise MessageError(f"{self.client} tells a loss, though its scalars are private")
        if spent is not None and not (0 <= spent.epsilon < math.inf and 0 < spent.delta < 1):
            raise MessageError(f"{self.client} tells no privacy: {spent}")

    def encode(self) -> bytes:
        """Returns the message."""
        steps, samples = self.scalars.shape
        unit = None if self.privacy is None else self.privacy.unit
        head = _REPLY.pack(vars(self) | {"steps": steps, "samples": samples, "unit": unit})
        spent = b"" if self.privacy is None else _PRIVACY.pack(vars(self.privacy))
        name = pack_name(self.client, "client name")
        return frame(self.KIND, head + self.scalars.astype("<f4").tobytes() + name + spent)


def _read_hello(reader: Reader) -> Hello:
    fixed = _HELLO.unpack(reader)
    identity = ModelIdentity(**{f.name: fixed.pop(f.name) for f in fields(ModelIdentity)})
    client, package = reader.text("client name"), reader.text("package version")
    return Hello(client=client, identity=identity, package=package, **fixed)


def _read_plan(reader: Reader) -> Plan:
    fixed = _PLAN.unpack(reader)
    blocks = fixed.pop("blocks")
    seeds = reader.array("<u8", fixed.pop("steps"), "seeds")
    fixed |= _FIRST.unpack(reader)
    bits = np.unpackbits(reader.array("u1", (blocks + 7) // 8, "mask"), bitorder="little")
    # One plan, one form: a client knows by its bytes whether it was asked the same before.
    if bits[blocks:].any():
        raise MessageError(f"the mask has bits after its {blocks} blocks")
    mask = tuple(bits[:blocks].astype(bool).tolist())
    plan = Plan(seeds=tuple(seeds.tolist()), mask=mask, frames=bytes(reader.rest()), **fixed)
    len(plan.entries)  # decoded now, so that a plan that was accepted can be followed
    return plan


def _read_reply(reader: Reader) -> Reply:
    fixed = _REPLY.unpack(reader)
    shape, unit = (fixed.pop("steps"), fixed.pop("samples")), fixed.pop("unit")
    # The reader compares the size with what is left before it takes anything.
    scalars = reader.array("<f4", shape[0] * shape[1], "scalars").astype(np.float32)
    client = reader.text("client name")
    spent = None if unit is None else PrivacySpent(unit, **_PRIVACY.unpack(reader))
    return Reply(client=client, scalars=scalars.reshape(shape), privacy=spent, **fixed)


Message = Greeting | Hello | Plan | Reply
_READ: dict[int, Callable[[Reader], Message]] = {
    Greeting.KIND: lambda reader: Greeting(**_GREETING.unpack(reader)),
    Hello.KIND: _read_hello,
    Plan.KIND: _read_plan,
    Reply.KIND: _read_reply,
}


def decode(data: bytes) -> Message:
    """Returns the message that the bytes are; MessageError tells why they are none."""
    # Plain fields and no pickle: bytes of a stranger can become one of four classes and no code.
    kind, reader = unframe(data, _READ)
    message = _READ[kind](reader)
    reader.end()
    return message


def _set_version(message: Hello | Plan) -> None:
    if message.noise_version < 0:
        object.__setattr__(message, "noise_version", VERSIONS[message.distribution])
