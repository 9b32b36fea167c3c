"""The four messages between server and clients: one schema, plain data, no code in any of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from zorba.defaults import Estimator
from zorba.federated.codec import Layout, Reader, check_name, frame, pack_name, unframe
from zorba.federated.errors import MessageError
from zorba.federated.privacy import PrivacySpent
from zorba.federated.settings import MAX_STEPS, positive_in_float32
from zorba.identity import MAX_BLOCKS, ModelIdentity
from zorba.log import LogEntry, LogError, decode_entries
from zorba_kernels.noise import NOISE_VERSION, Distribution, Rounding

# A field of fixed size is named here and in its message's class, and nowhere else. The codes are
# those of the module struct: Q is a uint64, I a uint32, H a uint16, B a uint8, d and f are floats.
_IDENTITY = Layout("model", "origin:Q start:Q layout:Q num_weights:Q num_blocks:H")
_GREETING = Layout("greeting", "job:Q")
_HELLO = Layout(
    "hello", "job:Q noise_version:B distribution:B rounding:B applied_round:I fingerprint:Q"
)
_PLAN = Layout(
    "plan",
    "job:Q round:I base_round:I mask_version:I noise_version:B estimator:B distribution:B "
    "rounding:B steps:H num_perturbations:H blocks:H eps:d local_lr:d clip:d num_entries:I",
)
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

    @staticmethod
    def read(reader: Reader) -> Greeting:
        """Returns the greeting of a payload."""
        return Greeting(**_GREETING.unpack(reader))


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
        # Names last: everything in front of them has a fixed place.
        names = pack_name(self.client, "client name") + pack_name(self.package, "package version")
        return frame(
            self.KIND, _HELLO.pack(vars(self)) + _IDENTITY.pack(vars(self.identity)) + names
        )

    @staticmethod
    def read(reader: Reader) -> Hello:
        """Returns the hello of a payload."""
        fixed = _HELLO.unpack(reader)
        identity = ModelIdentity(**_IDENTITY.unpack(reader))
        client, package = reader.text("client name"), reader.text("package version")
        return Hello(client=client, identity=identity, package=package, **fixed)


@dataclass(frozen=True)
class Plan:
    """Server to client: apply these log entries, then measure these directions.

    Attributes:
        job: uint64.
        round: the round that is measured, at the weights that round - 1 left.
        base_round: that the server knows the client to have applied; entries start after it.
        seeds: uint64 of each local step, [K]; the same for all clients. None at all: only apply.
        num_perturbations: P.
        eps: distance of the evaluations.
        estimator: of the scalars.
        distribution: of the noise, in the log entries too.
        rounding: of 16-bit weights in entries.
        mask: which blocks this client perturbs, [blocks].
        mask_version: of the masks of all clients.
        local_lr: learning rate of the local steps that ride along unwritten.
        clip: largest absolute scalar in those local steps; infinite for no limit.
        num_entries: log entries that the plan carries.
        frames: their bytes, one after the other, as they are in the log.
        noise_version: of the noise contract.
    """

    KIND: ClassVar[int] = 3

    job: int
    round: int
    base_round: int
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
    num_entries: int = 0
    frames: bytes = b""
    noise_version: int = NOISE_VERSION

    def __post_init__(self) -> None:
        """Raises MessageError where the parts do not belong together."""
        steps, samples = len(self.seeds), self.num_perturbations
        for fits, wrong in (
            (steps <= MAX_STEPS, f"at most {MAX_STEPS} local steps, got {steps}"),
            (1 <= samples <= MAX_STEPS, f"1 to {MAX_STEPS} perturbations, got {samples}"),
            (1 <= len(self.mask) <= MAX_BLOCKS, f"1 to {MAX_BLOCKS} blocks, got {len(self.mask)}"),
            (positive_in_float32(self.eps), f"a positive, finite eps in float32, got {self.eps}"),
            (0 <= self.local_lr < math.inf, f"a finite local_lr from 0 on, got {self.local_lr}"),
            (self.clip > 0, f"a positive clip, got {self.clip}"),
            (
                self.reached < self.round,
                f"the log of rounds before {self.round}, got {self.reached}",
            ),
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
        try:
            return decode_entries(
                self.frames, self.num_entries, self.base_round + 1, len(self.mask), self.job
            )
        except LogError as error:
            raise MessageError(f"log entries of a plan: {error}") from None

    def encode(self) -> bytes:
        """Returns the message."""
        return self.encode_each(np.array([self.mask]))[0]

    def encode_each(self, masks: npt.NDArray[np.bool_]) -> list[bytes]:
        """Returns this plan for many clients, each with its own mask in the place of ``mask``.

        Args:
            masks: bool [clients, blocks].
        """
        fixed = vars(self) | {"steps": len(self.seeds), "blocks": masks.shape[1]}
        head = _PLAN.pack(fixed) + np.array(self.seeds, "<u8").tobytes()
        packed = [row.tobytes() for row in np.packbits(masks, axis=1, bitorder="little")]
        # Clients with the same mask share one message: with thousands of them, each would take its
        # own copy of the log entries.
        made = {bits: frame(self.KIND, head + bits + self.frames) for bits in set(packed)}
        return [made[bits] for bits in packed]

    @staticmethod
    def read(reader: Reader) -> Plan:
        """Returns the plan of a payload; its entries are checked too."""
        fixed = _PLAN.unpack(reader)
        blocks = fixed.pop("blocks")
        seeds = reader.array("<u8", fixed.pop("steps"), "seeds")
        bits = np.unpackbits(reader.array("u1", (blocks + 7) // 8, "mask"), bitorder="little")
        # One plan, one form: a client knows by its bytes whether it was asked the same before.
        if bits[blocks:].any():
            raise MessageError(f"the mask has bits after its {blocks} blocks")
        plan = Plan(
            seeds=tuple(seeds.tolist()),
            mask=tuple(bits[:blocks].astype(bool).tolist()),
            frames=bytes(reader.rest()),
            **fixed,
        )
        len(plan.entries)  # decoded now, so that a plan that was accepted can be followed
        return plan


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
        # Checked here, so that neither side can make or take such a message: one nan in a sum of
        # thousands would be all that is left of it.
        if not np.isfinite(self.scalars).all():
            raise MessageError(
                f"scalars of {self.client} in round {self.round} must be finite: its loss "
                "overflowed or was no number"
            )
        if self.privacy is None and not math.isfinite(self.loss):
            raise MessageError(f"loss of {self.client} must be finite, got {self.loss}")
        if self.privacy is not None:
            # The accountant counts the scalars alone: an exact loss beside them would undo them.
            if not math.isnan(self.loss):
                raise MessageError(f"{self.client} tells a loss, though its scalars are private")
            if not (0 <= self.privacy.epsilon < math.inf and 0 < self.privacy.delta < 1):
                raise MessageError(f"{self.client} tells no privacy: {self.privacy}")

    @property
    def scalar_bytes(self) -> int:
        """Bytes of the scalars alone: 4 * K * P."""
        return int(self.scalars.nbytes)

    def encode(self) -> bytes:
        """Returns the message."""
        steps, samples = self.scalars.shape
        unit = None if self.privacy is None else self.privacy.unit
        head = _REPLY.pack(vars(self) | {"steps": steps, "samples": samples, "unit": unit})
        spent = b"" if self.privacy is None else _PRIVACY.pack(vars(self.privacy))
        name = pack_name(self.client, "client name")
        return frame(self.KIND, head + self.scalars.astype("<f4").tobytes() + name + spent)

    @staticmethod
    def read(reader: Reader) -> Reply:
        """Returns the reply of a payload."""
        fixed = _REPLY.unpack(reader)
        shape, unit = (fixed.pop("steps"), fixed.pop("samples")), fixed.pop("unit")
        # The reader compares the size with what is left before it takes anything.
        scalars = reader.array("<f4", shape[0] * shape[1], "scalars").astype(np.float32)
        client = reader.text("client name")
        spent = None if unit is None else PrivacySpent(unit, **_PRIVACY.unpack(reader))
        return Reply(client=client, scalars=scalars.reshape(shape), privacy=spent, **fixed)


Message = Greeting | Hello | Plan | Reply
_KINDS: dict[int, type[Greeting] | type[Hello] | type[Plan] | type[Reply]] = {
    kind.KIND: kind for kind in (Greeting, Hello, Plan, Reply)
}


def decode(data: bytes) -> Message:
    """Returns the message that the bytes are.

    Raises:
        MessageError: they are none; the error names what was wrong and what was expected.
    """
    # Plain fields and no pickle: bytes of a stranger can become one of four classes and no code.
    kind, reader = unframe(data, tuple(_KINDS))
    message = _KINDS[kind].read(reader)
    reader.end()
    return message
