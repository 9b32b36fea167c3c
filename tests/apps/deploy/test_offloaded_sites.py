"""Sites whose idle blocks wait on the host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="nvflare is in the test extra")

from zorba.apps.deploy.build import build_client, build_server
from zorba.apps.deploy.config import ServerConfig
from zorba.apps.deploy.project import init_project
from zorba.federated import LocalTransport, RunFolder, run_federation
from zorba.offload import Offload

from tests.apps.deploy.conftest import SITES, describe


@pytest.mark.parametrize("blocks", ["all", "last:2"])
def test_offloaded_sites_come_to_the_bits_of_resident_ones(
    base: Path, tmp_path: Path, blocks: str
) -> None:
    fingerprints = {}
    for offload in (False, True):
        folder = tmp_path / str(offload)
        plain = describe(base, folder)
        init_project(replace(plain, site=replace(plain.site, blocks=blocks, offload=offload)))
        config = ServerConfig.read(folder / "server")
        few = {
            site: replace(entry, active=entry.active[n % len(entry.active) :][:1])
            for n, (site, entry) in enumerate(config.sites.items())
        }
        clients = {site: build_client(folder / "sites" / site) for site in SITES}
        objective = clients["ada"].objective
        assert (Offload.of(objective._model) is not None) == offload
        server = build_server(replace(config, sites=few), RunFolder(tmp_path / f"run-{offload}"))
        result = run_federation(server, LocalTransport(clients), 4)
        server.close()
        assert not any(report.failures or report.refusals for report in result.reports)
        assert result.replicas_identical
        fingerprints[offload] = set(result.fingerprints.values())
    assert fingerprints[True] == fingerprints[False]
