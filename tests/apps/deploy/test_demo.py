"""``zorba federate demo`` and its folder; the rest of it needs the real model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from zorba.apps.deploy.command import FederateDemoSettings
from zorba.apps.deploy.config import ServerConfig
from zorba.apps.deploy.demo import clear, run_federate_demo
from zorba.apps.deploy.party import PartyFolder

from tests.apps.deploy.conftest import SITES, change_server

DEMO_JOB = "film-reviews"
DEMO_SITES = ("phone", "tablet", "laptop")


def rename(project: Path, job: str, sites: tuple[str, ...]) -> None:
    """Gives a project another job and other sites."""
    entries = list(ServerConfig.read(project / "server").sites.values())
    change_server(project / "server", job=job, sites=dict.fromkeys(sites, entries[0]))
    kept = project / "site"
    (project / "sites" / SITES[0]).rename(kept)
    shutil.rmtree(project / "sites")
    for site in sites:
        shutil.copytree(kept, project / "sites" / site)


def demo(out: Path, cache: Path) -> None:
    run_federate_demo(FederateDemoSettings(out=out, cache=cache))


def test_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(ValueError, match=r"holds no demo, and there is no .*server\.yaml"):
        demo(tmp_path / "out", tmp_path / "cache")
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("job", "sites"),
    [("tiny", DEMO_SITES), (DEMO_JOB, SITES), (DEMO_JOB, (*DEMO_SITES, "watch"))],
    ids=["other job", "other sites", "one site more"],
)
def test_project_that_is_no_demo_is_left_alone(
    project: Path, tmp_path: Path, job: str, sites: tuple[str, ...]
) -> None:
    rename(project, job, sites)
    before = sorted(project.rglob("*"))
    with pytest.raises(ValueError, match=r"holds the project .*, not a demo.*another folder"):
        demo(project, tmp_path / "cache")
    with pytest.raises(ValueError, match="not a demo"):
        clear(project)
    assert sorted(project.rglob("*")) == before
    assert not (tmp_path / "cache").exists(), "refused before anything is fetched"


def test_project_whose_file_cannot_be_read_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "p" / "server").mkdir(parents=True)
    (tmp_path / "p" / "server" / "server.yaml").write_text("rounds: [")
    with pytest.raises(ValueError, match="give another folder"):
        clear(tmp_path / "p")
    assert (tmp_path / "p" / "server" / "server.yaml").exists()


@pytest.fixture
def earlier(project: Path) -> Path:
    """A project as an earlier demo left it."""
    rename(project, DEMO_JOB, DEMO_SITES)
    return project


def test_earlier_demo_is_removed(earlier: Path) -> None:
    clear(earlier)
    assert not earlier.exists()
    clear(earlier)


def test_earlier_demo_survives_a_fetch_that_fails(
    earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(cache: Path) -> Path:
        raise RuntimeError("no network")

    monkeypatch.setattr("zorba.apps.reviews.packages.fetch_model", fail)
    with pytest.raises(RuntimeError, match="no network"):
        demo(earlier, tmp_path / "cache")
    assert ServerConfig.read(earlier / "server").job == DEMO_JOB


def test_demo_that_runs_is_left_alone(earlier: Path, tmp_path: Path) -> None:
    with (
        PartyFolder(earlier / "sites" / "phone").only_one(),
        pytest.raises(ValueError, match=r"phone of .* runs: zorba federate stop"),
    ):
        demo(earlier, tmp_path / "cache")
    assert ServerConfig.read(earlier / "server").job == DEMO_JOB
