"""TrajectoryWriter: records what an optimizer does to the weights."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor, nn

from zorba.files import write_whole
from zorba.identity import model_fingerprint, package_version
from zorba.log.errors import TrajectoryError
from zorba.log.file import Trajectory
from zorba.log.frame import frame
from zorba.log.header import (
    Tables,
    TrajectoryHeader,
    as_tables,
    fingerprint_of,
    parameters_of,
)
from zorba.log.record import Encoder, Step, footer_body, skip_body
from zorba.optim.terms import NoiseTerms
from zorba_kernels.noise import DISTRIBUTIONS, ROUNDINGS, Distribution, Rounding
from zorba_kernels.program import check_choice, check_uint64
from zorba_kernels.table import DTYPE_CODES


class TrajectoryWriter:
    """A trajectory that is open for appending.

    Make one with ``create`` before the first step, or with ``resume`` to go on with a run that was
    stopped. Give it every step in order, ``append`` for an update and ``skip`` for a step that left
    the weights alone, and end with ``finish``. What was appended is with the operating system: it
    survives the process, and after ``sync`` a power cut. A crash loses at most the record that was
    being written, which readers detect.

    The record is of updates alone: the placement must leave the weights otherwise untouched, as
    "scratch" does. "inplace" restores to rounding, which no record tells.

    Used as a context manager it is finished on a regular exit and only closed on an exception.

    Attributes:
        path: of the file.
        header: of the file.
        next_step: number of the step that must come next.
    """

    def __init__(
        self, path: Path, header: TrajectoryHeader, tables: Tables, salt: int, size: int
    ) -> None:
        """Use ``create`` or ``resume``."""
        self.path = path
        self.header = header
        self.next_step = header.first_step
        self._tables = as_tables(tables)
        self._salt = salt
        self._size = size
        self._encoder = Encoder(header.run_seed, header.num_groups)
        self._file: BinaryIO = path.open("r+b", buffering=0)

    @staticmethod
    def create(
        path: str | Path,
        tables: Tables,
        run_seed: int,
        distribution: Distribution,
        rounding: Rounding,
        *,
        model: nn.Module | None = None,
        settings: Mapping[str, Any] | None = None,
        first_step: int = 0,
    ) -> TrajectoryWriter:
        """Starts a trajectory at the weights as they are now.

        Args:
            path: of a file that does not exist; by custom it ends in ".zot".
            tables: the active parameters, a table or several of different devices.
            run_seed: uint64; step t is of seed ``step_seed(run_seed, t)``. Others are recorded in
                full.
            distribution: of the noise.
            rounding: of 16-bit weights.
            model: whose parameters they are, so that the frozen ones are told apart too.
            settings: of the run, to be read by people; anything that JSON knows.
            first_step: number of the step that comes next.

        Raises:
            TrajectoryError: the file exists, or the table cannot be recorded.
        """
        check_choice("distribution", distribution, DISTRIBUTIONS)
        check_choice("rounding", rounding, ROUNDINGS)
        check_uint64(first_step, "first_step")
        target = Path(path)
        if target.exists():
            raise TrajectoryError(f"{target} exists: give another path, or resume it")
        parts = as_tables(tables)
        weights = [] if model is None else _weights(model)
        header = TrajectoryHeader(
            run_seed=check_uint64(run_seed, "run_seed"),
            first_step=first_step,
            distribution=distribution,
            rounding=rounding,
            parameters=parameters_of(parts),
            num_groups=parts[0].num_groups,
            base=fingerprint_of(parts),
            whole=model_fingerprint(weights) if weights else None,
            settings=settings or {},
            architecture=None if model is None else type(model).__name__,
            dtype=_main_dtype(weights),
            package=package_version(),
        )
        data = header.encode()
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, data)
        return TrajectoryWriter(target, header, parts, _salt(data), len(data))

    @staticmethod
    def resume(path: str | Path, tables: Tables, step: int) -> TrajectoryWriter:
        """Goes on with a trajectory whose run continues with ``step``.

        What the file tells of that step and later ones, which the run will do again, is cut, and so
        is a torn tail.

        Args:
            path: of the file.
            tables: the active parameters as they are before ``step``.
            step: number of the step that comes next.

        Raises:
            TrajectoryError: the file is damaged, of other parameters, or ends before ``step``; it
                is left as it is.
        """
        trajectory = Trajectory.read(path)
        header = trajectory.header
        wrong = header.parameter_difference(parameters_of(as_tables(tables)))
        if wrong:
            raise TrajectoryError(f"{path} is of other parameters: {wrong}")
        size, pattern = trajectory.position(step)
        writer = TrajectoryWriter(Path(path), header, tables, trajectory.salt, size)
        writer._encoder = Encoder(header.run_seed, header.num_groups, pattern)
        writer._file.truncate(size)
        writer.next_step = step
        return writer

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._size

    def append(
        self,
        step: int,
        terms: NoiseTerms,
        rounding_seed: int | None = None,
        decay: Tensor | None = None,
    ) -> None:
        """Records an update, given what ``Placement.update`` was given.

        Args:
            step: number of the step; must be ``next_step``.
            terms: final coefficients, learning rate included; seeds may be of older steps.
            rounding_seed: uint64; the first seed of ``terms`` by default.
            decay: float32 [groups], or None.

        Raises:
            TrajectoryError: the step is out of order or cannot be recorded, or the file could not
                be written (a full disk); the file then is as before.
        """
        self._check_next(step)
        seed = rounding_seed if rounding_seed is not None else next(iter(terms.seeds), 0)
        record = Step(step, terms, check_uint64(seed, "rounding_seed"), decay)
        body, pattern = self._encoder.step(record)
        self._write(body, f"step {step}")
        self._encoder.wrote(pattern)
        self.next_step += 1

    def skip(self, step: int) -> None:
        """Records that a step left the weights alone; raises as ``append`` does."""
        self._check_next(step)
        self._write(skip_body(), f"step {step}")
        self.next_step += 1

    def finish(self) -> int:
        """Ends the file with the fingerprint of the weights as they are now, and closes it.

        Returns:
            The fingerprint.
        """
        fingerprint = fingerprint_of(self._tables)
        self._write(footer_body(fingerprint), "the end")
        self.sync()
        self.close()
        return fingerprint

    def sync(self) -> None:
        """Makes what was appended survive a power cut; to be called before a checkpoint is."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; without ``finish`` a replay of it cannot be verified."""
        self._file.close()

    def __enter__(self) -> TrajectoryWriter:
        """Returns the writer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finishes or closes."""
        if kind is None and not self._file.closed:
            self.finish()
        self.close()

    def _check_next(self, step: int) -> None:
        if self._file.closed:
            raise TrajectoryError(f"{self.path} is finished: step {step} cannot be recorded")
        if step != self.next_step:
            raise TrajectoryError(
                f"step {step} came after step {self.next_step - 1}; {self.path} must have every "
                "step, skipped ones too"
            )

    def _write(self, body: bytes, what: str) -> None:
        data = frame(body, self._size, self._salt)
        try:
            self._file.seek(self._size)
            if self._file.write(data) != len(data):
                raise OSError("the record was written in part")
        except BaseException as error:
            self._file.truncate(self._size)
            if isinstance(error, OSError):
                raise TrajectoryError(f"{what} was not written to {self.path}: {error}") from error
            raise
        self._size += len(data)


def _salt(header: bytes) -> int:
    return int.from_bytes(header[-4:], "little")


def _weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters that have a fingerprint: those of quantised dtypes have none."""
    return [(n, p) for n, p in model.named_parameters() if p.dtype in DTYPE_CODES]


def _main_dtype(weights: list[tuple[str, Tensor]]) -> str | None:
    counts: Counter[str] = Counter()
    for _, p in weights:
        counts[str(p.dtype).removeprefix("torch.")] += p.numel()
    return counts.most_common(1)[0][0] if counts else None
