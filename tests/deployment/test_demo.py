"""What ``zorba federate demo`` does with its folder; the rest of it needs the real model."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("nvflare", reason="nvflare is in the test extra")

from zorba.deployment.config import ServerConfig
from zorba.deployment.demo import FederateDemoSettings, run_federate_demo
from zorba.deployment.project import init_project
from zorba.deployment.supervisor import PartyFolder, only_one

from tests.deployment.conftest import describe


def demo(out: Path, cache: Path) -> None:
    run_federate_demo(FederateDemoSettings(out=out, cache=cache), Console(file=io.StringIO()))


def test_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(ValueError, match="holds something else than a project"):
        demo(tmp_path / "out", tmp_path / "cache")
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    assert not (tmp_path / "cache").exists()


def test_demo_that_runs_is_left_alone(base: Path, tmp_path: Path) -> None:
    init_project(describe(base, tmp_path / "p"))
    with (
        only_one(PartyFolder(tmp_path / "p" / "sites" / "bob")),
        pytest.raises(ValueError, match=r"bob of .* runs: zorba federate stop"),
    ):
        demo(tmp_path / "p", tmp_path / "cache")
    assert ServerConfig.read(tmp_path / "p" / "server").job == "tiny"
