"""Replica: a client's copy of the trainable weights, which is theta_0 and the log applied to it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import zorba_kernels as zk
from zorba import defaults
from zorba.federated.errors import DivergedError, GapError, ReplicaError
from zorba.files import write_whole
from zorba.identity import ModelIdentity, identity_of
from zorba.log import LogEntry, apply_entries
from zorba.tables import Tables, fingerprint
from zorba_kernels.noise import VERSIONS, Distribution, Rounding

CHECKPOINT_SCHEMA = 1
_KEY = "zorba_replica"  # of a checkpoint's metadata


class Replica:
    """Weights in a ParamTable, and the round up to which the log was applied to them.

    Make it while the weights are theta_0: it takes the model's identity from them. Several clients
    of one process may share one. Checkpoints need the package safetensors.

    Args:
        table: the trainable weights; group b of it is block b. ``apply`` and ``load`` modify them.
            ``DeviceTables`` where idle blocks are on the host, or may come to be.
        origin: ``model_fingerprint`` of all parameters at theta_0, frozen ones too, so that two
            models that differ only in frozen weights are told apart.
        distribution: of the noise that the client's objective makes.
        rounding: of 16-bit weights in updates.
    """

    def __init__(
        self,
        table: Tables,
        origin: int,
        distribution: Distribution = defaults.DISTRIBUTION,
        rounding: Rounding = "stochastic",
    ) -> None:
        self.table = table
        self.identity = identity_of(table, origin)  # of the model at theta_0
        self.distribution = distribution
        self.rounding = rounding
        self.applied_round = 0  # the last round whose entry was applied; 0 at theta_0
        self.job: int | None = None  # of the log that was applied; None as long as any will do
        self.passes = 0  # how often ``apply`` read and wrote the weights
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
        """Returns the uint64 fingerprint: ``fresh``, or as of the last change that is known of."""
        self._check_whole()
        if fresh or self._fingerprint is None:
            self._fingerprint = fingerprint(self.table)
        return self._fingerprint

    def apply(self, entries: Iterable[LogEntry]) -> int:
        """Applies log entries in one pass over the weights, and returns how many were new.

        Entries are of a log of the replica's noise and rounding, in the order of rounds. R of them
        in one call leave the bits of R calls.

        Raises:
            GapError: entries are missing after ``applied_round``.
            DivergedError: the weights are not those that the entries were measured at.
            ReplicaError: an entry is for another number of blocks.
            In all cases the weights are as before.
        """
        self._check_whole()
        # So a repeated message, or a client that shares the replica, does no harm.
        new = [entry for entry in entries if entry.number > self.applied_round]
        for applied, entry in enumerate(new, self.applied_round):
            if entry.number != applied + 1:
                raise GapError(
                    f"the replica has applied round {applied} but the first log entry given is of "
                    f"round {entry.number}: ask for the log from round {applied + 1}"
                )
            blocks, mine = entry.terms.coefs.shape[0], self.identity.num_blocks
            if blocks != mine:
                told = f"entry {entry.number} is for {blocks} blocks, this replica has {mine}"
                raise ReplicaError(told)
        # Building on other weights would make a difference that nobody could find the start of.
        base = new[0].base if new else None
        if base is not None and base != self.fingerprint():
            raise DivergedError(
                f"after round {self.applied_round} this replica has fingerprint "
                f"{self.fingerprint():#018x}, the others have {base:#018x}: its weights were "
                "changed from outside; load a checkpoint, or start again from the original model"
            )
        # Set until the round is noted: a Ctrl-C or a fault leaves a replica that says so, not one
        # that applies the same rounds a second time.
        self._interrupted = True
        if not all(entry.empty for entry in new):
            self._fingerprint = None
            apply_entries(self.table, new, self.distribution, self.rounding)
            self.passes += 1
        self.applied_round += len(new)
        self._interrupted = False
        return len(new)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file in one step: one that was there stays until it is whole."""
        from safetensors.torch import save_file  # optional: only checkpoints need it

        info = {
            **self._law(),
            "identity": asdict(self.identity),
            "job": self.job or 0,
            "applied_round": self.applied_round,
            # Read from the weights: where they were changed from outside, the next entry finds it.
            "fingerprint": self.fingerprint(fresh=True),
        }
        # safetensors refuses tensors that share a storage, which slices of one buffer do.
        tensors = {
            e.name: t if t.untyped_storage().nbytes() == t.nbytes else t.clone()
            for e in self.table.entries
            for t in [e.tensor.contiguous()]
        }
        # Weights and round in one file, in one step: two files could be of two rounds after a kill.
        metadata = {_KEY: json.dumps(info, sort_keys=True)}
        write_whole(Path(path), lambda draft: save_file(tensors, draft, metadata=metadata))

    def load(self, path: str | Path) -> None:
        """Replaces the weights by those of a checkpoint.

        ReplicaError: it is damaged or of another model, noise or rounding; nothing changed.
        """
        from safetensors import SafetensorError, safe_open  # optional: only checkpoints need it

        # Everything is read and checked before a weight is changed: a bad file costs nothing.
        try:
            with safe_open(path, framework="pt") as file:
                info: dict[str, Any] = json.loads(file.metadata()[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            identity = ModelIdentity(**info["identity"])
            applied, job, saved = (info[key] for key in ("applied_round", "job", "fingerprint"))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ReplicaError(f"{path} cannot be read as a checkpoint: {error!r}") from None
        for what, mine in self._law().items():
            if info.get(what) != mine:
                raise ReplicaError(f"{path} is of {what} {info.get(what)}, this replica of {mine}")
        if wrong := self.identity.difference(identity):
            raise ReplicaError(f"{path} is of {wrong}")
        # The dtype as well: the same numbers in another dtype are other bits, and another replica.
        entries = self.table.entries
        found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        if found != {e.name: (e.tensor.shape, e.tensor.dtype) for e in entries}:
            raise ReplicaError(f"{path} has other names, shapes or dtypes than its model")
        # A slice of a parameter has the noise, and the fingerprint, of its place in the whole.
        loaded = zk.ParamTable(tensors, offsets={e.name: e.offset for e in entries})
        if zk.fingerprint(loaded) != saved:
            raise ReplicaError(f"checkpoint {path} is damaged: its fingerprint does not match")
        # From here on only an interrupt can leave the weights half copied.
        self._interrupted = True
        with torch.no_grad():
            for entry in entries:
                entry.tensor.copy_(tensors[entry.name])
        self.applied_round, self.job, self._fingerprint = applied, job or None, saved
        self._interrupted = False

    def _law(self) -> dict[str, Any]:
        law = {"distribution": self.distribution, "rounding": self.rounding}
        return {"schema": CHECKPOINT_SCHEMA, "noise_version": VERSIONS[self.distribution]} | law

    def _check_whole(self) -> None:
        if self._interrupted:
            raise ReplicaError(
                "the replica was interrupted while its weights were written: load a checkpoint, or "
                "start again from the original model"
            )
