"""TrajectoryWriter: records what an optimizer does to the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zorba.identity import identity_of, model_fingerprint, recordable
from zorba.log.binary import LogError
from zorba.log.entry import LogEntry
from zorba.log.file import LogFile
from zorba.log.header import LogHeader, dtype_name, parameters_of
from zorba.optim import NoiseTerms
from zorba.tables import TableLike, fingerprint
from zorba_kernels.noise import Distribution, Rounding
from zorba_kernels.program import check_uint64

SUFFIX = ".zot"


class TrajectoryWriter:
    """A trajectory that is open for appending.

    Make one with ``create`` before the first step, or with ``resume`` to go on with a run that was
    stopped. Give it every step in order, ``append`` for an update and ``skip`` for a step that left
    the weights alone, and end with ``finish``. It records updates alone: the placement must leave
    the weights otherwise untouched, as "scratch" does. As a context manager it is finished on a
    regular exit and only closed on an exception. A crash loses at most the entry that was being
    written.
    """

    def __init__(self, log: LogFile, tables: TableLike) -> None:
        self.log, self._tables = log, tables

    @staticmethod
    def create(
        path: str | Path,
        tables: TableLike,
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
            run_seed: uint64; step t is of seed ``step_seed(run_seed, t)``, others take 8 bytes.
            distribution: of the noise.
            rounding: of 16-bit weights.
            model: whose parameters they are, so that the frozen ones are told apart too.
            settings: of the run, for people; plain JSON.
            first_step: number of the step that comes next.

        Raises:
            LogError: the file exists, or the table cannot be recorded.
        """
        if Path(path).exists() and Path(path).stat().st_size:
            raise LogError(f"{path} exists: give another path, or resume it")
        # One read of all weights now lets a replay refuse a base whose frozen part differs.
        weights = {} if model is None else recordable(model)
        sizes: Counter[str] = Counter()
        for p in weights.values():
            sizes[dtype_name(p.dtype)] += p.numel()
        header = LogHeader(
            log_id=0,
            identity=identity_of(tables, model_fingerprint(weights) if weights else None),
            distribution=distribution,
            rounding=rounding,
            first=check_uint64(first_step, "first_step"),
            run_seed=check_uint64(run_seed, "run_seed"),
            parameters=parameters_of(tables),
            settings=settings or {},
            architecture=None if model is None else type(model).__name__,
            dtype=max(sizes, key=lambda dtype: sizes[dtype], default=None),
        ).with_own_id()
        # A step takes milliseconds, an fsync may take as long: checkpoints ask for one (``sync``).
        return TrajectoryWriter(LogFile(path, header, durable=False), tables)

    @staticmethod
    def resume(path: str | Path, tables: TableLike, step: int) -> TrajectoryWriter:
        """Goes on with a trajectory whose run continues with ``step``.

        The entries of that step and later ones, which the run will make again, are cut, and so is a
        torn tail. ``tables`` are the active parameters as they are before ``step``. LogError, and
        the file as it was: it is damaged, of other parameters, or ends before ``step``.
        """
        # Everything is checked before the file is cut: a wrong table must not cost the record.
        log = LogFile(path, durable=False)
        try:
            if wrong := log.header.parameter_difference(parameters_of(tables)):
                raise LogError(f"{path} is of other parameters: {wrong}")
            log.rewind(step)
        except BaseException:
            log.close()
            raise
        return TrajectoryWriter(log, tables)

    def append(
        self,
        step: int,
        terms: NoiseTerms,
        rounding_seed: int | None = None,
        decay: Tensor | None = None,
    ) -> None:
        """Records an update, given its number and the arguments of ``Placement.update``.

        LogError, and the file as before: the step is out of order, or the disk is full.
        """
        # The default of ``zk.add_noise_``: the record must have the seed that the pass had.
        seed = rounding_seed if rounding_seed is not None else next(iter(terms.seeds), 0)
        self.log.append(LogEntry(step, terms, check_uint64(seed, "rounding_seed"), decay))

    def skip(self, step: int) -> None:
        """Records that a step left the weights alone; raises as ``append`` does."""
        self.log.append(LogEntry(step, NoiseTerms.none(self.log.header.num_groups), 0))

    def finish(self) -> None:
        """Ends the file with the fingerprint of the weights as they are now, and closes it."""
        self.log.finish(fingerprint(self._tables))

    def sync(self) -> None:
        """Makes what was appended survive a power cut; to be called before a checkpoint is."""
        self.log.sync()

    def close(self) -> None:
        """Closes the file; without ``finish`` a replay of it cannot be verified."""
        self.log.close()

    def __enter__(self) -> TrajectoryWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and not self.log.closed:
            self.finish()
        self.close()
