"""Trajectory: a file that was read and checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from zorba.log.errors import DamagedError, TrajectoryError
from zorba.log.frame import frame_after, unframe
from zorba.log.header import TrajectoryHeader, decode_header
from zorba.log.record import Decoder, Footer, Skip, Step

SUFFIX = ".zot"


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A fine-tune without its weights: what every step did to them.

    Read one with ``Trajectory.read``. Steps are decoded while they are iterated over.

    Attributes:
        header: what it starts from.
        num_steps: steps that changed weights.
        num_skipped: steps that left them alone.
        next_step: number of the step that would come next in the run.
        fingerprint: of the active parameters after the last step; None where the run was never
            finished, so that a replay cannot be verified.
        torn_bytes: bytes of a torn tail, which a crash left and which were ignored.
        size: bytes of what counts, the torn tail left out.
        salt: what the CRCs of records continue from.
    """

    header: TrajectoryHeader
    num_steps: int
    num_skipped: int
    next_step: int
    fingerprint: int | None
    torn_bytes: int
    size: int
    salt: int
    _data: bytes = field(repr=False)
    _start: int

    @staticmethod
    def read(path: str | Path) -> Trajectory:
        """Reads a file and checks every byte of it; the file is not modified.

        A torn tail is ignored and told by ``torn_bytes``.

        Raises:
            TrajectoryError: the file is no trajectory, of another format or noise version, or
                damaged elsewhere than at its end.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise TrajectoryError(f"{path} cannot be read: {error}") from None
        try:
            return parse(data)
        except TrajectoryError as error:
            raise type(error)(f"{path}: {error}") from None

    def steps(self) -> Iterator[Step]:
        """Yields the steps that changed weights, in order."""
        for _, record, _, _ in self._records():
            if isinstance(record, Step):
                yield record

    def position(self, step: int) -> tuple[int, bytes]:
        """Returns where the record of a step starts, and the pattern in force there.

        Raises:
            TrajectoryError: the trajectory does not reach that far, or starts later.
        """
        first = self.header.first_step
        if not first <= step <= self.next_step:
            raise TrajectoryError(
                f"the trajectory has steps {first} to {self.next_step - 1}: it cannot go on "
                f"with step {step}"
            )
        at, pattern = self._start, b""
        for _, record, end, decoder in self._records():
            if isinstance(record, Footer) or record.step >= step:
                break
            at, pattern = end, decoder.pattern
        return at, pattern

    def _records(self) -> Iterator[tuple[int, Step | Skip | Footer, int, Decoder]]:
        return _records(self._data, self.header, self.salt, self._start, self.size)


def parse(data: bytes) -> Trajectory:
    """``Trajectory.read`` of a file's bytes."""
    header, start = decode_header(data)
    salt = int.from_bytes(data[start - 4 : start], "little")  # the CRC that ends the header
    steps = skipped = 0
    fingerprint: int | None = None
    end, next_step = start, header.first_step
    torn = 0
    try:
        for at, record, after, decoder in _records(data, header, salt, start, len(data)):
            if fingerprint is not None:
                raise TrajectoryError(f"offset {at}: a record after the last one")
            steps += isinstance(record, Step)
            skipped += isinstance(record, Skip)
            if isinstance(record, Footer):
                fingerprint = record.fingerprint
            end, next_step = after, decoder.next_step
    except DamagedError as error:
        if frame_after(memoryview(data), end, salt):
            raise TrajectoryError(
                f"offset {end}, step {next_step}: {error}. Records after it are whole, so this is "
                "no torn tail: restore the file from a copy"
            ) from None
        torn = len(data) - end
    return Trajectory(header, steps, skipped, next_step, fingerprint, torn, end, salt, data, start)


def _records(
    data: bytes, header: TrajectoryHeader, salt: int, start: int, stop: int
) -> Iterator[tuple[int, Step | Skip | Footer, int, Decoder]]:
    """Yields offset, record, its end, and the decoder as it left it."""
    view = memoryview(data)[:stop]
    decoder = Decoder(header.run_seed, header.num_groups, header.first_step)
    at = start
    while at < stop:
        body, end = unframe(view, at, salt)
        try:
            record = decoder.record(body)
        except TrajectoryError as error:  # undamaged: somebody wrote it like that
            raise TrajectoryError(f"offset {at}, step {decoder.next_step}: {error}") from None
        yield at, record, end, decoder
        at = end
