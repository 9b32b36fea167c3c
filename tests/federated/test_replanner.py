"""Replanner: importance found in mid-run, new masks, and a server that was started again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy")

from zorba.federated import Client, LocalTransport, Replanner, Replica, Server, run_federation
from zorba.optim import NoiseTerms, one_by_one
from zorba.planning import InfeasiblePlanError, MemoryModel

import zorba_kernels as zk
from tests.federated.world import BLOCKS, copy_table, make_replica, make_settings

SCALES = (8.0, 1.0, 1.0, 0.25)
NAMES = tuple(f"client-{n}" for n in range(6))
# Everyone has room for two blocks; each pair of blocks is on one client.
MASKS = np.array(
    [
        [b in pair for b in range(BLOCKS)]
        for pair in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    ]
)
MEMORY = MemoryModel([100] * BLOCKS, [0] * BLOCKS)
BUDGETS = dict.fromkeys(NAMES, 200)


def block_losses(table: zk.ParamTable) -> list[float]:
    return [
        scale * float((entry.tensor.double() ** 2).mean())
        for scale, entry in zip(SCALES, table.entries, strict=True)
    ]


def squared_norms(table: zk.ParamTable) -> np.ndarray:
    """Of the gradient of each block: of ``s mean(w^2)`` it is ``2 s w / n``."""
    return np.array(
        [
            4 * scale**2 * float((e.tensor.double() ** 2).sum()) / e.tensor.numel() ** 2
            for scale, e in zip(SCALES, table.entries, strict=True)
        ]
    )


def make_client(name: str, replica: Replica) -> Client:
    def evaluate(terms: NoiseTerms) -> float:
        perturbed = copy_table(replica.table)
        if terms.seeds:
            zk.add_noise_(
                perturbed, terms.seeds, terms.coefs, replica.distribution, samples=terms.samples
            )
        return sum(block_losses(perturbed))

    return Client(name, replica, lambda round_number, step: (one_by_one(evaluate), 1))


class Run:
    """A server and clients whose blocks differ in importance."""

    def __init__(self, path: Path, names: tuple[str, ...] = NAMES, **settings: Any) -> None:
        self.path = path
        self.settings = make_settings(lr=1e-4, **{"num_perturbations": 4, **settings})
        self.replicas = {name: make_replica() for name in names}
        self.clients = {name: make_client(name, self.replicas[name]) for name in names}
        self.transport = LocalTransport(self.clients)
        self.server = self.start()

    def start(self) -> Server:
        identity = next(iter(self.replicas.values())).identity
        return Server(
            self.settings, identity, list(self.clients), MASKS[: len(self.clients)], self.path
        )

    def fingerprints(self) -> set[int]:
        return {replica.fingerprint(fresh=True) for replica in self.replicas.values()}


def test_finds_importance_and_gives_new_masks(tmp_path: Path) -> None:
    run = Run(tmp_path / "log", num_perturbations=20)
    replanner = Replanner(MEMORY, BUDGETS, every=12)
    truth = squared_norms(run.replicas[NAMES[0]].table)
    result = run_federation(run.server, run.transport, 14, replanner=replanner)
    assert replanner.importance is not None
    order = np.argsort(truth)
    assert (np.argsort(replanner.importance)[-1:] == order[-1:]).all()
    assert replanner.importance[order[-1]] == pytest.approx(
        truth[order[-1]] / truth.mean(), rel=0.3
    )
    changed = [report.round for report in result.reports if report.replanned]
    assert changed == [12]
    assert replanner.plan is not None
    coverage = np.array(list(run.server.masks.values())).sum(axis=0)
    assert coverage.tolist() == list(replanner.plan.coverage)
    assert coverage[0] == max(coverage) > 3
    assert (coverage >= 1).all()
    versions = {report.entry.mask_version for report in result.reports}
    assert len(versions) == 1 + len(changed)
    assert result.replicas_identical
    assert len(run.fingerprints()) == 1


def test_does_nothing_unless_it_is_given(tmp_path: Path) -> None:
    run = Run(tmp_path / "log")
    result = run_federation(run.server, run.transport, 3)
    assert not any(report.replanned for report in result.reports)
    assert (np.array(list(run.server.masks.values())) == MASKS).all()


def test_keeps_masks_that_are_nearly_as_good(tmp_path: Path) -> None:
    run = Run(tmp_path / "log")
    replanner = Replanner(MEMORY, BUDGETS, every=2, least_gain=0.99)
    result = run_federation(run.server, run.transport, 6, replanner=replanner)
    assert not any(report.replanned for report in result.reports)
    assert replanner.plan is None
    assert replanner.importance is not None


def test_a_restarted_server_goes_on(tmp_path: Path) -> None:
    """The same run with a kill in the middle ends with the same masks and bits."""
    fingerprints, masks = [], []
    for name, stops in (("whole", [13]), ("killed", [7, 6])):
        run = Run(tmp_path / f"{name}.log")
        for rounds in stops:
            replanner = Replanner(MEMORY, BUDGETS, every=4, state=tmp_path / f"{name}.json")
            run_federation(run.server, run.transport, rounds, replanner=replanner)
            run.server.close()
            masks.append(run.server.masks)
            run.server = run.start()
        fingerprints.append(run.fingerprints())
    assert fingerprints[0] == fingerprints[1]
    assert masks[0] == masks[2]


def test_without_its_state_replicas_still_agree(tmp_path: Path) -> None:
    run = Run(tmp_path / "log")
    run_federation(run.server, run.transport, 7, replanner=Replanner(MEMORY, BUDGETS, every=3))
    run.server.close()
    run.server = run.start()
    result = run_federation(
        run.server, run.transport, 7, replanner=Replanner(MEMORY, BUDGETS, every=3)
    )
    assert result.replicas_identical
    assert len(run.fingerprints()) == 1


def test_clients_may_leave_and_stay_away(tmp_path: Path) -> None:
    run = Run(tmp_path / "log")
    fixed = dict.fromkeys(NAMES, 10)
    memory = MemoryModel([100] * BLOCKS, [0] * BLOCKS, fixed)
    replanner = Replanner(memory, dict.fromkeys(NAMES, 210), every=2)
    present = list(NAMES[:-1])
    run_federation(run.server, run.transport, 4, available=lambda t: present, replanner=replanner)
    run.server.set_masks(present, MASKS[: len(present)])  # the last one is gone for good
    result = run_federation(
        run.server, run.transport, 4, available=lambda t: present, replanner=replanner
    )
    assert set(run.server.masks) == set(present)
    assert result.fingerprints.keys() == set(present)
    assert len(set(result.fingerprints.values())) == 1


def test_refuses_a_state_that_is_not_its_own(tmp_path: Path) -> None:
    run = Run(tmp_path / "log")
    state = tmp_path / "state.json"
    run_federation(
        run.server, run.transport, 1, replanner=Replanner(MEMORY, BUDGETS, every=5, state=state)
    )
    record = json.loads(state.read_text())
    state.write_text(json.dumps(record | {"job": 1}))
    with pytest.raises(ValueError, match="of job 0x0000000000000001"):
        Replanner(MEMORY, BUDGETS, every=5, state=state).begin(run.server)
    state.write_text("{}")
    with pytest.raises(ValueError, match="no state of a Replanner"):
        Replanner(MEMORY, BUDGETS, every=5, state=state).begin(run.server)


def test_says_what_is_missing(tmp_path: Path) -> None:
    run = Run(tmp_path / "log")
    with pytest.raises(ValueError, match="no budget for client-5"):
        run_federation(
            run.server,
            run.transport,
            1,
            replanner=Replanner(MEMORY, dict.fromkeys(NAMES[:-1], 200), every=1),
        )
    with pytest.raises(InfeasiblePlanError, match="client-0"):
        run_federation(
            run.server,
            run.transport,
            1,
            replanner=Replanner(MEMORY, dict.fromkeys(NAMES, 99), every=1),
        )
    with pytest.raises(ValueError, match="at least 1"):
        Replanner(MEMORY, BUDGETS, every=0)
    with pytest.raises(ValueError, match="priorities itself"):
        Replanner(MEMORY, BUDGETS, every=1, priorities=[1.0] * BLOCKS)
