"""What server and clients say to each other: four messages, one schema, no code in any of them."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from zorba.federated.codec import (
    ESTIMATOR_CODES,
    Reader,
    check_name,
    decode_choice,
    frame,
    pack_checked,
    pack_name,
    unframe,
)
from zorba.federated.entry import LogEntry, split_records
from zorba.federated.errors import MessageError
from zorba.federated.identity import MAX_BLOCKS, ModelIdentity
from zorba.federated.privacy import PrivacySpent
from zorba.federated.settings import MAX_STEPS, positive_in_float32
from zorba.log.binary import DISTRIBUTION_CODES, ROUNDING_CODES
from zorba.optim.estimator import Estimator
from zorba_kernels.noise import NOISE_VERSION, Distribution, Rounding

_GREETING = struct.Struct("<Q")
# job, origin, start, layout, weights, blocks, noise, distribution, rounding, applied, fingerprint
_HELLO = struct.Struct("<QQQQQHBBBIQ")
# job, round, base round, mask version, noise, estimator, distribution, rounding, K, P, blocks,
# eps, local lr, clip, log entries
_PLAN = struct.Struct("<QIIIBBBBHHHdddI")
# job, round, applied, K, P, examples, loss, fingerprint
_REPLY = struct.Struct("<QIIHHIfQ")
_PRIVACY = struct.Struct("<dd")  # epsilon, delta; after a unit, where it is not 0
UNIT_CODES = {"example": 1, "client": 2}


@dataclass(frozen=True)
class Greeting:
    """Server to a client that it does not know: which job this is. The answer is a Hello."""

    KIND: ClassVar[int] = 1

    job: int

    def encode(self) -> bytes:
        """Returns the message."""
        return frame(self.KIND, pack_checked(_GREETING, "greeting", self.job))

    @staticmethod
    def read(reader: Reader) -> Greeting:
        """Returns the greeting of a payload."""
        (job,) = reader.unpack(_GREETING, "greeting")
        return Greeting(job)


@dataclass(frozen=True)
class Hello:
    """Client to server: who it is and what it holds. Also the answer to a plan it cannot follow.

    Attributes:
        client: its name.
        job: that its replica is bound to.
        identity: of its model at theta_0.
        distribution: that its objective makes.
        rounding: of its replica.
        applied_round: of its replica: it needs the log from the next one on.
        fingerprint: of its replica now.
        package: version of its package.
        noise_version: of its kernels.
    """

    KIND: ClassVar[int] = 2

    client: str
    job: int
    identity: ModelIdentity
    distribution: Distribution
    rounding: Rounding
    applied_round: int
    fingerprint: int
    package: str
    noise_version: int = NOISE_VERSION

    def encode(self) -> bytes:
        """Returns the message."""
        fixed = pack_checked(
            _HELLO,
            "hello",
            self.job,
            self.identity.origin,
            self.identity.start,
            self.identity.layout,
            self.identity.num_weights,
            self.identity.num_blocks,
            self.noise_version,
            DISTRIBUTION_CODES[self.distribution],
            ROUNDING_CODES[self.rounding],
            self.applied_round,
            self.fingerprint,
        )
        names = pack_name(self.client, "client name") + pack_name(self.package, "package version")
        return frame(self.KIND, fixed + names)

    @staticmethod
    def read(reader: Reader) -> Hello:
        """Returns the hello of a payload."""
        job, origin, start, layout, weights, blocks, noise, law, rounding, applied, now = (
            reader.unpack(_HELLO, "hello")
        )
        return Hello(
            client=reader.text("client name"),
            job=job,
            identity=ModelIdentity(origin, start, layout, weights, blocks),
            distribution=decode_choice(DISTRIBUTION_CODES, law, "distribution"),
            rounding=decode_choice(ROUNDING_CODES, rounding, "rounding"),
            applied_round=applied,
            fingerprint=now,
            package=reader.text("package version"),
            noise_version=noise,
        )


@dataclass(frozen=True)
class Plan:
    """Server to client: apply these log entries, then measure these directions.

    Attributes:
        job: uint64.
        round: the round that is measured, at the weights that round - 1 left.
        base_round: that the server knows the client to have applied; entries start after it.
        entries: of the log, without a gap.
        seeds: uint64 of each local step, [K]; the same for all clients. None at all: only apply.
        num_perturbations: P.
        eps: distance of the evaluations.
        estimator: of the scalars.
        distribution: of the noise.
        rounding: of 16-bit weights in entries.
        mask: which blocks this client perturbs, [blocks].
        mask_version: of the masks of all clients.
        local_lr: learning rate of the local steps that ride along unwritten.
        clip: largest absolute scalar in those local steps; infinite for no limit.
        noise_version: of the noise contract.
    """

    KIND: ClassVar[int] = 3

    job: int
    round: int
    base_round: int
    entries: tuple[LogEntry, ...]
    seeds: tuple[int, ...]
    num_perturbations: int
    eps: float
    estimator: Estimator
    distribution: Distribution
    rounding: Rounding
    mask: tuple[bool, ...]
    mask_version: int
    local_lr: float
    clip: float = math.inf
    noise_version: int = NOISE_VERSION

    def __post_init__(self) -> None:
        """Raises MessageError where the parts do not belong together."""
        if len(self.seeds) > MAX_STEPS or not 1 <= self.num_perturbations <= MAX_STEPS:
            raise MessageError(
                f"a plan has up to {MAX_STEPS} local steps and 1 to {MAX_STEPS} perturbations, got "
                f"{len(self.seeds)} and {self.num_perturbations}"
            )
        if not 1 <= len(self.mask) <= MAX_BLOCKS:
            raise MessageError(f"a mask has 1 to {MAX_BLOCKS} blocks, got {len(self.mask)}")
        if not positive_in_float32(self.eps):
            raise MessageError(f"eps must be positive and finite in float32, got {self.eps}")
        if not (math.isfinite(self.local_lr) and self.local_lr >= 0):
            raise MessageError(f"local_lr must be finite and not negative, got {self.local_lr}")
        if not self.clip > 0:
            raise MessageError(f"clip must be positive, got {self.clip}")
        for at, entry in enumerate(self.entries):
            if entry.round != self.base_round + 1 + at:
                raise MessageError(
                    f"log entry {at} of the plan is of round {entry.round}, expected "
                    f"{self.base_round + 1 + at}"
                )
        if self.base_round + len(self.entries) >= self.round:
            raise MessageError(
                f"a plan of round {self.round} carries the log up to round "
                f"{self.base_round + len(self.entries)}; it must end before"
            )

    def encode(self) -> bytes:
        """Returns the message."""
        records = b"".join(entry.record for entry in self.entries)
        return self.encode_each(np.array([self.mask]), len(self.entries), records)[0]

    def encode_each(
        self, masks: npt.NDArray[np.bool_], num_entries: int, records: bytes
    ) -> list[bytes]:
        """Returns this plan for many clients, each with its own mask.

        Args:
            masks: bool [clients, blocks], in the place of ``mask``.
            num_entries: how many log entries the plans carry, in the place of ``entries``.
            records: bytes of these entries, as in the log.
        """
        fixed = pack_checked(
            _PLAN,
            "plan",
            self.job,
            self.round,
            self.base_round,
            self.mask_version,
            self.noise_version,
            ESTIMATOR_CODES[self.estimator],
            DISTRIBUTION_CODES[self.distribution],
            ROUNDING_CODES[self.rounding],
            len(self.seeds),
            self.num_perturbations,
            masks.shape[1],
            self.eps,
            self.local_lr,
            self.clip,
            num_entries,
        )
        head = fixed + pack_checked(struct.Struct(f"<{len(self.seeds)}Q"), "seeds", *self.seeds)
        packed = [row.tobytes() for row in np.packbits(masks, axis=1, bitorder="little")]
        made = {bits: frame(self.KIND, head + bits + records) for bits in set(packed)}
        return [made[bits] for bits in packed]

    @staticmethod
    def read(reader: Reader) -> Plan:
        """Returns the plan of a payload."""
        fields = reader.unpack(_PLAN, "plan")
        job, round_number, base, version, noise, estimator, law, rounding = fields[:8]
        steps, samples, blocks, eps, local_lr, clip, count = fields[8:]
        seeds = reader.array("<u8", steps, "seeds")
        packed = reader.array("u1", (blocks + 7) // 8, "mask")
        bits = np.unpackbits(packed, bitorder="little")
        if bits[blocks:].any():
            raise MessageError(f"the mask has bits after its {blocks} blocks")
        return Plan(
            job=job,
            round=round_number,
            base_round=base,
            entries=tuple(split_records(reader.rest(), count)),
            seeds=tuple(int(s) for s in seeds),
            num_perturbations=samples,
            eps=eps,
            estimator=decode_choice(ESTIMATOR_CODES, estimator, "estimator"),
            distribution=decode_choice(DISTRIBUTION_CODES, law, "distribution"),
            rounding=decode_choice(ROUNDING_CODES, rounding, "rounding"),
            mask=tuple(bool(b) for b in bits[:blocks]),
            mask_version=version,
            local_lr=local_lr,
            clip=clip,
            noise_version=noise,
        )


@dataclass(frozen=True, eq=False)
class Reply:
    """Client to server: what it measured.

    Attributes:
        job: uint64.
        round: of the plan.
        client: its name.
        applied_round: of the replica that was measured.
        fingerprint: of the replica that was measured.
        scalars: float32 [K, P], finite.
        num_examples: in the batches of all local steps.
        loss: mean of the losses seen: telemetry, it decides nothing. nan where it is private.
        privacy: what the client's scalars have told so far; None where it adds no noise.
    """

    KIND: ClassVar[int] = 4

    job: int
    round: int
    client: str
    applied_round: int
    fingerprint: int
    scalars: npt.NDArray[np.float32]
    num_examples: int
    loss: float
    privacy: PrivacySpent | None = None

    def __post_init__(self) -> None:
        """Raises MessageError where the parts do not belong together."""
        check_name(self.client, "client name")
        if self.scalars.ndim != 2 or self.scalars.dtype != np.float32:
            raise MessageError(f"scalars must be float32 [K, P], got {self.scalars.shape}")
        if not np.isfinite(self.scalars).all():
            raise MessageError(
                f"scalars of {self.client} in round {self.round} must be finite: its loss "
                "overflowed or was no number"
            )
        if self.privacy is not None:
            if not math.isnan(self.loss):
                raise MessageError(f"{self.client} tells a loss, though its scalars are private")
            if not (0 <= self.privacy.epsilon < math.inf and 0 < self.privacy.delta < 1):
                raise MessageError(f"{self.client} tells no privacy: {self.privacy}")
        elif not math.isfinite(self.loss):
            raise MessageError(f"loss of {self.client} must be finite, got {self.loss}")

    @property
    def scalar_bytes(self) -> int:
        """Bytes of the scalars alone: 4 * K * P."""
        return int(self.scalars.nbytes)

    def encode(self) -> bytes:
        """Returns the message."""
        fixed = pack_checked(
            _REPLY,
            "reply",
            self.job,
            self.round,
            self.applied_round,
            *self.scalars.shape,
            self.num_examples,
            self.loss,
            self.fingerprint,
        )
        name = pack_name(self.client, "client name")
        told = b"\0"
        if self.privacy is not None:
            p = self.privacy
            unit = bytes([UNIT_CODES[p.unit]])
            told = unit + pack_checked(_PRIVACY, "privacy", p.epsilon, p.delta)
        return frame(self.KIND, fixed + self.scalars.astype("<f4").tobytes() + name + told)

    @staticmethod
    def read(reader: Reader) -> Reply:
        """Returns the reply of a payload."""
        job, round_number, applied, steps, samples, examples, loss, now = reader.unpack(
            _REPLY, "reply"
        )
        scalars = reader.array("<f4", steps * samples, "scalars").astype(np.float32)
        name = reader.text("client name")
        (unit,) = reader.raw(1, "unit of privacy")
        privacy = None
        if unit:
            chosen = decode_choice(UNIT_CODES, unit, "unit of privacy")
            privacy = PrivacySpent(chosen, *reader.unpack(_PRIVACY, "privacy"))
        return Reply(
            job=job,
            round=round_number,
            client=name,
            applied_round=applied,
            fingerprint=now,
            scalars=scalars.reshape(steps, samples),
            num_examples=examples,
            loss=loss,
            privacy=privacy,
        )


Message = Greeting | Hello | Plan | Reply
_KINDS: dict[int, type[Greeting] | type[Hello] | type[Plan] | type[Reply]] = {
    kind.KIND: kind for kind in (Greeting, Hello, Plan, Reply)
}


def decode(data: bytes) -> Message:
    """Returns the message that the bytes are.

    Raises:
        MessageError: they are none; the error names what was wrong and what was expected.
    """
    kind, reader = unframe(data, tuple(_KINDS))
    message = _KINDS[kind].read(reader)
    reader.end()
    return message
