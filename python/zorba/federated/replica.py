"""Replica: a client's copy of the trainable weights, which is theta_0 and the log applied to it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

import zorba_kernels as zk
from zorba import defaults
from zorba.federated.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint
from zorba.federated.errors import DivergedError, GapError, ReplicaError
from zorba.identity import identity_of
from zorba.log import LogEntry, apply_entries
from zorba.tables import Tables, each_table, fingerprint
from zorba_kernels.noise import Distribution, Rounding


class Replica:
    """Weights in a ParamTable, and the round up to which the log was applied to them.

    Make it while the weights are theta_0: it takes the model's identity from them. Several clients
    of one process may share one.

    Args:
        table: the trainable weights; group b of it is block b. ``apply`` and ``load`` modify them.
            ``DeviceTables`` where idle blocks are on the host, or may come to be.
        origin: ``model_fingerprint`` of all parameters at theta_0, frozen ones too, so that two
            models that differ only in frozen weights are told apart.
        distribution: of the noise that the client's objective makes.
        rounding: of 16-bit weights in updates.

    Attributes:
        applied_round: the last round whose entry was applied; 0 at theta_0.
        job: of the log that was applied; None as long as any will do.
        passes: how often the weights were read and written by ``apply``.
    """

    def __init__(
        self,
        table: Tables,
        origin: int,
        distribution: Distribution = defaults.DISTRIBUTION,
        rounding: Rounding = "stochastic",
    ) -> None:
        self.table = table
        self.identity = identity_of(table, origin)
        self.distribution = distribution
        self.rounding = rounding
        self.applied_round = 0
        self.job: int | None = None
        self.passes = 0
        self._fingerprint: int | None = self.identity.start
        self._interrupted = False

    def bind(self, job: int) -> None:
        """Ties the replica to a job, or raises ReplicaError when it holds rounds of another."""
        # At theta_0 any job will do. Later the rounds of another one are in the weights for good.
        if self.job is not None and self.job != job and self.applied_round:
            raise ReplicaError(
                f"the replica has {self.applied_round} rounds of job {self.job:#018x} applied and "
                f"cannot join job {job:#018x}: start again from the original model"
            )
        self.job = job

    def fingerprint(self, *, fresh: bool = False) -> int:
        """Returns the uint64 fingerprint of the weights.

        They are read with ``fresh``, and otherwise once after a change that this object knows of.
        """
        self._check_whole()
        if fresh or self._fingerprint is None:
            self._fingerprint = fingerprint(self.table)
        return self._fingerprint

    def apply(self, entries: Iterable[LogEntry]) -> int:
        """Applies log entries in one pass over the weights, and returns how many were new.

        R entries in one call leave the bits of R calls.

        Args:
            entries: of a log of the replica's noise and rounding, in the order of rounds, without
                a gap among them.

        Raises:
            GapError: entries are missing after ``applied_round``.
            DivergedError: the weights are not those that the entries were measured at.
            ReplicaError: an entry is for another number of blocks.
            In all cases the weights are as before.
        """
        self._check_whole()
        # Rounds that were applied before are left out, so that a repeated message, or a client
        # that shares the replica, does no harm.
        new = [entry for entry in entries if entry.number > self.applied_round]
        for at, entry in enumerate(new):
            if entry.number != self.applied_round + 1 + at:
                raise GapError(self.applied_round + at, entry.number)
            blocks = entry.terms.coefs.shape[0]
            if blocks != self.identity.num_blocks:
                raise ReplicaError(
                    f"log entry of round {entry.number} is for {blocks} blocks, this replica has "
                    f"{self.identity.num_blocks}"
                )
        if not new:
            return 0
        # Entries say what they were measured at. To build on other weights would make a difference
        # that nobody could ever find the start of.
        base = new[0].base
        if base is not None and base != self.fingerprint():
            raise DivergedError(
                f"after round {self.applied_round} this replica has fingerprint "
                f"{self.fingerprint():#018x}, the others have {base:#018x}: its weights were "
                "changed from outside; load a checkpoint, or start again from the original model"
            )
        self._write(new)
        return len(new)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file in one step: one that was there stays until it is whole."""
        # Read from the weights: where they were changed from outside, the next entry finds it.
        info = CheckpointInfo(
            job=self.job or 0,
            applied_round=self.applied_round,
            fingerprint=self.fingerprint(fresh=True),
            identity=self.identity,
            distribution=self.distribution,
            rounding=self.rounding,
        )
        save_checkpoint(Path(path), self.table, info)

    def load(self, path: str | Path) -> None:
        """Replaces the weights by those of a checkpoint.

        Raises:
            ReplicaError: it is damaged or of another model, noise or rounding; nothing changed.
        """
        info, tensors = load_checkpoint(Path(path), self.table)
        for what in ("distribution", "rounding"):
            mine, theirs = getattr(self, what), getattr(info, what)
            if mine != theirs:
                raise ReplicaError(f"{path} is of {what} {theirs}, this replica of {mine}")
        wrong = self.identity.difference(info.identity)
        if wrong:
            raise ReplicaError(f"{path} is of {wrong}")
        # Everything was checked; from here on only an interrupt can leave the weights half copied.
        self._interrupted = True
        with torch.no_grad():
            for entry in self.table.entries:
                entry.tensor.copy_(tensors[entry.name])
        self.applied_round = info.applied_round
        self.job = info.job or None
        self._fingerprint = info.fingerprint
        self._interrupted = False

    def _write(self, entries: list[LogEntry]) -> None:
        if all(entry.empty for entry in entries):
            self.applied_round = entries[-1].number
            return
        # Set while weights are written, until the round is noted: a Ctrl-C then leaves a replica
        # that says so, not one that applies the same rounds a second time.
        before, self._fingerprint = self._fingerprint, None
        self._interrupted = True
        written = False
        try:
            for table in each_table(self.table):
                apply_entries(table, entries, self.distribution, self.rounding)
                written = True
        except (TypeError, ValueError, zk.BackendUnavailableError):
            if not written:  # refused by the checks, which come before the first write
                self._interrupted, self._fingerprint = False, before
            raise
        self.applied_round = entries[-1].number
        self.passes += 1
        self._interrupted = False

    def _check_whole(self) -> None:
        if self._interrupted:
            raise ReplicaError(
                "the replica was interrupted while its weights were written: load a checkpoint, or "
                "start again from the original model"
            )
