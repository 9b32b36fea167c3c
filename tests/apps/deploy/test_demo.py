"""What ``zorba federate demo`` does with its folder; the rest of it needs the real model."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("nvflare", reason="nvflare is in the test extra")

from zorba.apps.deploy.config import ServerConfig
from zorba.apps.deploy.demo import FederateDemoSettings, clear, run_federate_demo
from zorba.apps.deploy.project import init_project
from zorba.apps.deploy.supervisor import PartyFolder, only_one

from tests.apps.deploy.conftest import describe

DEMO_JOB = "film-reviews"
DEMO_SITES = ("phone", "tablet", "laptop")


def demo(out: Path, cache: Path) -> None:
    run_federate_demo(FederateDemoSettings(out=out, cache=cache), Console(file=io.StringIO()))


def test_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(ValueError, match="holds something else than a project"):
        demo(tmp_path / "out", tmp_path / "cache")
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"budgets": dict.fromkeys(DEMO_SITES, 0)},
        {"job": DEMO_JOB},
        {"job": DEMO_JOB, "budgets": dict.fromkeys((*DEMO_SITES, "watch"), 0)},
    ],
    ids=["other job", "other sites", "one site more"],
)
def test_project_that_is_no_demo_is_left_alone(
    base: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    init_project(describe(base, tmp_path / "p", **changes))
    before = sorted((tmp_path / "p").rglob("*"))
    with pytest.raises(ValueError, match=r"holds the project .*, not a demo.*another folder"):
        demo(tmp_path / "p", tmp_path / "cache")
    with pytest.raises(ValueError, match="not a demo"):
        clear(tmp_path / "p")
    assert sorted((tmp_path / "p").rglob("*")) == before
    assert not (tmp_path / "cache").exists(), "refused before anything is fetched"


def test_project_whose_file_cannot_be_read_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "p" / "server").mkdir(parents=True)
    (tmp_path / "p" / "server" / "server.yaml").write_text("rounds: [")
    with pytest.raises(ValueError, match="give another folder"):
        clear(tmp_path / "p")
    assert (tmp_path / "p" / "server" / "server.yaml").exists()


@pytest.fixture
def earlier(base: Path, tmp_path: Path) -> Path:
    """What an earlier demo left."""
    budgets = dict.fromkeys(DEMO_SITES, 0)
    init_project(describe(base, tmp_path / "p", job=DEMO_JOB, budgets=budgets))
    return tmp_path / "p"


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
        only_one(PartyFolder(earlier / "sites" / "phone")),
        pytest.raises(ValueError, match=r"phone of .* runs: zorba federate stop"),
    ):
        demo(earlier, tmp_path / "cache")
    assert ServerConfig.read(earlier / "server").job == DEMO_JOB
