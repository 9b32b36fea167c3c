"""Client: answers a plan with what it measured. It knows no network."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from zorba.federated.aggregate import clip_scalars, update_coefs
from zorba.federated.codec import check_name
from zorba.federated.errors import DivergedError, FederationError, GapError, MessageError
from zorba.federated.messages import Greeting, Hello, Plan, Reply, decode
from zorba.federated.privacy import PrivacyAccountant
from zorba.federated.replica import Replica
from zorba.identity import package_version
from zorba.optim.own import examples_each, own_scalars
from zorba.optim.terms import (
    Evaluate,
    NoiseTerms,
    RowTerms,
    differences,
    evaluation_noises,
    mean_loss,
    row_noises,
)
from zorba_kernels.noise import VERSIONS

Objective = Callable[[int, int], tuple[Evaluate, int]]
"""``objective(round, step)`` picks a batch and returns (the losses on it at the weights plus given
noises, its number of examples). The same round and step must pick the same batch. A loss may be an
array of one for each example, which privacy of examples and ``by_row`` need."""


class Client:
    """One participant: a replica, and an objective on its own data.

    Args:
        name: 1 to 64 letters, digits and ``._+-``.
        replica: its weights; other clients of the same process may hold the same one.
        objective: see ``Objective``. What it evaluates must leave the weights as they are, and make
            noise of the replica's distribution.
        checkpoint: path of a checkpoint that is kept up to date; None for none. To continue from
            it, call ``replica.load`` before.
        checkpoint_every: rounds between checkpoints.
        privacy: makes the scalars private before anybody sees them; None tells what was measured.
        by_row: whether the objective takes ``RowTerms``, as ``ModelObjective.by_row`` tells. Then
            a batch is cut into a part for each direction that is the client's own, and all of them
            are measured in one forward. Else each is measured on the whole batch.
    """

    def __init__(
        self,
        name: str,
        replica: Replica,
        objective: Objective,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 50,
        privacy: PrivacyAccountant | None = None,
        by_row: bool = False,
    ) -> None:
        self.name = check_name(name, "client name")
        self.replica = replica
        self.objective = objective
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.checkpoint_every = checkpoint_every
        self._saved_round = replica.applied_round
        self.privacy = privacy
        self.by_row = by_row
        # Digest of what the last plan asked, and the reply to it.
        self._last = None if privacy is None else privacy.last

    def handle(self, data: bytes) -> bytes:
        """Answers a message of the server.

        A plan is answered with a Reply, or, when the replica cannot follow it, with a Hello that
        tells how far it is; a greeting with a Hello. A plan that asks the same again, whatever log
        entries come with it, gets the same bytes again.

        Raises:
            MessageError: the message is malformed, of another job, or of a round that is over.
            ReplicaError: the replica is of another job, or was interrupted while it was written.
            FederationError: a scalar or loss is not finite, or the privacy budget is spent.
            Exception: what the objective raises. Log entries stay applied; nothing else changed.
        """
        message = decode(data)
        if isinstance(message, Greeting):
            self.replica.bind(message.job)
            return self._hello(message.job)
        if not isinstance(message, Plan):
            raise MessageError(f"a server sends no {type(message).__name__.lower()}")
        # Entries are left out of the digest: a server that starts again may send more of the log
        # with the same question, and new noise on the same scalars would spend privacy twice.
        question = replace(message, base_round=0, num_entries=0, frames=b"")
        asked = hashlib.sha256(question.encode()).digest()
        if message.seeds and self._last is not None and self._last[0] == asked:
            return self._last[1]
        # Before anything is applied: what this client cannot serve must not touch its weights.
        self._check(message)
        try:
            self.replica.bind(message.job)
            self.replica.apply(message.entries)
        except (GapError, DivergedError):  # the server judges, and knows what to send
            return self._hello(message.job)
        # Scalars of older weights would be worse than none: the server is asked for the rest.
        needed = message.round - 1 if message.seeds else message.reached
        applied = self.replica.applied_round
        if applied < needed:
            return self._hello(message.job)
        if applied >= message.round:
            told = f"got a plan of round {message.round} but has applied round {applied}"
            raise MessageError(f"{self.name} {told}: the plan is stale")
        answer = self._measure(message).encode()
        if message.seeds:
            # Counted on disk before the answer leaves: what others saw is never forgotten.
            if self.privacy is not None:
                self.privacy.note(len(message.seeds), asked, answer)
            self._last = (asked, answer)
        # After the answer: a checkpoint costs time, never a round. An old one means catching up.
        if applied >= self._saved_round + self.checkpoint_every:
            self.save()
        return answer

    def save(self) -> None:
        """Writes the checkpoint now, if it lacks rounds. OSError leaves the old one in place."""
        if self.checkpoint is not None and self.replica.applied_round > self._saved_round:
            self.replica.save(self.checkpoint)
            self._saved_round = self.replica.applied_round

    def _hello(self, job: int) -> bytes:
        r = self.replica
        now = r.fingerprint(fresh=True)  # so a replica that was changed from outside is found
        what = (r.identity, r.distribution, r.rounding, r.applied_round, now)
        return Hello(self.name, job, *what, package_version()).encode()

    def _check(self, plan: Plan) -> None:
        for what, theirs, mine in (
            ("noise version", plan.noise_version, VERSIONS[plan.distribution]),
            ("distribution", plan.distribution, self.replica.distribution),
            ("rounding", plan.rounding, self.replica.rounding),
            ("number of blocks", len(plan.mask), self.replica.identity.num_blocks),
        ):
            if theirs != mine:
                raise MessageError(f"the plan is for {what} {theirs}, {self.name} has {mine}")

    def _measure(self, plan: Plan) -> Reply:
        # Asked first: a budget that is spent must not be found out after the measurement.
        spent = None if self.privacy is None else self.privacy.afford(len(plan.seeds))
        mask = torch.tensor(plan.mask, dtype=torch.float32)
        count, first = plan.num_perturbations, plan.first_sample
        samples = tuple(range(first, first + count))
        whole = self.privacy is not None and self.privacy.privacy.unit == "client"
        cut = plan.directions == "own" and self.by_row and not whole
        scalars = np.zeros((len(plan.seeds), len(samples)), dtype=np.float32)
        # Steps after the first see the earlier ones as noise that rides along with theirs: the
        # weights are never written, so a crash, or clients that share a replica, cost nothing.
        pending = NoiseTerms.none(len(mask))
        losses: list[float] = []
        examples = 0
        for step, seed in enumerate(plan.seeds):
            evaluate, rows = self.objective(plan.round, step)
            each = examples_each(rows, count)  # of a direction, where the batch is cut
            noises: Sequence[NoiseTerms | RowTerms]
            if cut:
                own = RowTerms(seed, each, plan.eps * mask, first, base=pending)
                noises = row_noises([own], plan.estimator)
            else:
                how = (plan.eps, count, plan.estimator, plan.mask, pending, first)
                noises = evaluation_noises(seed, *how)
            seen = list(evaluate(noises))
            if cut and any(np.shape(loss) != (rows,) for loss in seen):
                raise FederationError(
                    f"{self.name} measured {rows} examples by row, but got losses of shape "
                    f"{list(np.shape(seen[0]))}: there must be one for each"
                )
            examples += rows
            if self.privacy is not None:  # finite or not: whether it is would tell something
                measured = differences(seen, plan.eps, plan.estimator)
                scalars[step] = self.privacy.release(measured, rows, count if cut else 1)
            else:
                means = [float(np.mean(loss)) for loss in seen]
                losses.append(mean_loss(means))
                with np.errstate(over="ignore", invalid="ignore"):  # checked below
                    scalars[step] = (
                        own_scalars(seen, plan.eps, plan.estimator, each, count)
                        if cut
                        else differences(means, plan.eps, plan.estimator)
                    )
            # Cut and scaled as the server does it: these are the coefficients that the log would
            # have if the client were alone, bit for bit.
            coefs = update_coefs(clip_scalars(scalars[step : step + 1], plan.clip), plan.local_lr)
            if not (np.isfinite(coefs).all() and np.isfinite(losses).all()):
                raise FederationError(
                    f"{self.name}, round {plan.round}, step {step}: a loss or scalar is not finite "
                    "or the step along the scalars overflows; this client sits the round out"
                )
            masked = mask[:, None] * torch.from_numpy(coefs)
            pending = pending.plus(NoiseTerms((seed,) * len(samples), samples, masked))
        loss = math.nan if spent else math.fsum(losses) / max(1, len(losses))
        measured_at = (self.replica.applied_round, self.replica.fingerprint())
        return Reply(
            plan.job, plan.round, self.name, *measured_at, scalars, examples, loss, privacy=spent
        )
