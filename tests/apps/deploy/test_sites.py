"""Server and clients of a project's files, in one process: plain, offloaded and private sites."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from zorba.apps.deploy.build import build_client, build_server
from zorba.apps.deploy.config import PrivacySection, ServerConfig
from zorba.apps.deploy.control import show_summary
from zorba.apps.deploy.engine import summarise
from zorba.apps.deploy.party import PartyFolder
from zorba.federated import (
    Client,
    FederationResult,
    LocalTransport,
    Privacy,
    PrivacyAccountant,
    ReplicaError,
    RunFolder,
    RunRecorder,
    run_federation,
)
from zorba.offload import Offload

from tests.apps.deploy.conftest import SITES, change_server, change_site

ROUNDS = 3
POLICIES: dict[str, dict[str, Any]] = {
    "ada": {"unit": "example", "clip": 1.0, "noise_multiplier": 4.0, "delta": 1e-5},
    "bob": {"unit": "client", "clip": 2.0, "noise_multiplier": 8.0, "delta": 1e-6},
}


def make_private(project: Path, site: str, **changes: Any) -> None:
    privacy = PrivacySection(**(POLICIES[site] | changes))
    change_site(project / "sites" / site, privacy=privacy, balanced=site != "ada")


def run(project: Path) -> tuple[FederationResult, dict[str, Client]]:
    """Runs a project in this process, with a run folder as over the engine."""
    folder = RunFolder(project / "server" / "run")
    server = build_server(ServerConfig.read(project / "server"), folder)
    clients = {site: build_client(project / "sites" / site) for site in SITES}
    with RunRecorder(folder, server, ROUNDS) as recorder:
        result = run_federation(server, LocalTransport(clients), ROUNDS, recorder.round)
        recorder.end(result)
    server.close()
    return result, clients


def test_files_make_a_server_and_clients_that_run(project: Path) -> None:
    result, clients = run(project)
    assert result.replicas_identical
    assert result.fingerprints.keys() == set(SITES)
    assert all(report.clients == SITES for report in result.reports)
    assert clients["ada"].privacy is None
    assert not (project / "sites" / "ada" / "run" / "privacy.json").exists()
    for client in clients.values():
        client.save()
    again = build_client(project / "sites" / "bob").replica
    assert again.applied_round == ROUNDS
    assert again.fingerprint() == result.fingerprints["bob"]


def test_checkpoint_of_another_model_is_refused_with_what_to_do(project: Path) -> None:
    site = project / "sites" / "ada"
    client = build_client(site)
    client.replica.applied_round = 1
    client.save()
    change_site(site, blocks="last:1")
    with pytest.raises(ReplicaError, match="to start from the model, remove the file"):
        build_client(site)


def test_offloaded_sites_come_to_the_bits_of_resident_ones(project: Path) -> None:
    sites = ServerConfig.read(project / "server").sites.items()
    few = {site: active[n % len(active) :][:1] for n, (site, active) in enumerate(sites)}
    change_server(project / "server", sites=few)
    fingerprints = []
    for offload in (False, True):
        for site in SITES:
            change_site(project / "sites" / site, offload=offload)
        RunFolder(project / "server" / "run").clear()
        result, clients = run(project)
        model: Any = clients["ada"].objective
        assert (Offload.of(model.model) is not None) == offload
        assert not any(report.failures or report.refusals for report in result.reports)
        assert result.replicas_identical
        fingerprints.append(set(result.fingerprints.values()))
    assert fingerprints[0] == fingerprints[1]


# --- Private sites --------------------------------------------------------------------------------


def test_epsilon_of_each_private_site_is_in_the_summary(project: Path) -> None:
    for site in POLICIES:
        make_private(project, site)
    result, _ = run(project)
    assert result.replicas_identical
    content = summarise(RunFolder(project / "server" / "run"))
    assert content["privacy"].keys() == POLICIES.keys()
    console = Console(file=io.StringIO(), width=120)
    show_summary(PartyFolder(project / "server"), content, console)
    shown = console.file.getvalue()
    assert f"{ROUNDS} of {ROUNDS}" in shown
    for site, policy in POLICIES.items():
        spent = PrivacyAccountant(Privacy(**policy)).spent(ROUNDS)
        expected = {"unit": spent.unit, "epsilon": spent.epsilon, "delta": spent.delta}
        assert content["privacy"][site] == expected
        told = f"epsilon {spent.epsilon:.3g} at delta {policy['delta']:g}, of each {spent.unit}"
        assert f"{site} has told {told}" in shown
    assert "cleo has told" not in shown


def test_what_was_spent_counts_after_a_restart(project: Path) -> None:
    make_private(project, "ada")
    client = build_client(project / "sites" / "ada")
    assert client.privacy is not None
    client.privacy.note(50, b"question", b"answer")
    make_private(project, "ada", noise_multiplier=8.0)
    again = build_client(project / "sites" / "ada")
    assert again.privacy is not None
    assert again.privacy.last == (b"question", b"answer")
    assert again.privacy.spent().epsilon == client.privacy.spent().epsilon > 0


def test_budget_that_is_spent_is_told_and_the_others_go_on(project: Path) -> None:
    make_private(project, "ada", max_epsilon=0.5)
    result, _ = run(project)
    assert result.replicas_identical
    for report in result.reports:
        assert report.clients == ("bob", "cleo")
        assert "the privacy budget is spent" in report.failures["ada"]
