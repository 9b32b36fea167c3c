"""Supervisors: what starts them, what ends them, and what they need."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from zorba.apps.deploy import control
from zorba.apps.deploy.config import ConfigError
from zorba.apps.deploy.party import PartyFolder, parties

from tests.apps.deploy.deployed import Deployed


@pytest.fixture
def deployed(project: Path) -> Iterator[Deployed]:
    made = Deployed(project)
    yield made
    made.end()


def start(deployed: Deployed) -> None:
    control.start(parties(deployed.folder), Console(quiet=True))


def test_interrupted_start_leaves_no_process(
    deployed: Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's engine runs by then, and the sites' supervisors have no lock yet."""
    await_lock = control._await_lock

    def interrupt(party: PartyFolder, *process: subprocess.Popen[bytes]) -> None:
        if not party.is_server:
            raise KeyboardInterrupt
        await_lock(party, *process)
        assert deployed.processes()

    monkeypatch.setattr(control, "_await_lock", interrupt)
    with pytest.raises(KeyboardInterrupt):
        start(deployed)
    assert deployed.processes() == []


def test_start_that_fails_half_way_leaves_no_process(deployed: Deployed) -> None:
    (deployed.folder / "sites" / "bob" / "run" / "engine.log").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        start(deployed)
    assert deployed.processes() == []


def test_supervisor_that_ends_at_once_is_told(
    deployed: Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_LONGEST_SECONDS", float("inf"))
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ConfigError, match="server did not start: see"):
        start(deployed)


def test_supervisor_loads_no_torch() -> None:
    """Nor does the engine's session, which the server's supervisor opens."""
    code = "import sys, zorba.apps.deploy.party, nvflare.fuel.flare_api.flare_api; "
    code += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
