"""Fixtures of the deployment's tests: projects of three sites with a tiny model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nvflare", reason="nvflare is in the test extra")

from zorba.apps.deploy.command import InitSettings
from zorba.apps.deploy.config import ServerConfig, SiteConfig
from zorba.apps.deploy.project import init_project

from tests.apps.finetune.tiny import ROWS, save_tiny_llama

SITES = ("ada", "bob", "cleo")


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_tiny_llama(folder / "model", torch.float32)
    for number, site in enumerate(SITES):
        rows = [row for at, row in enumerate(ROWS) if at % len(SITES) != number]
        (folder / f"{site}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def wanted(base: Path, folder: Path, **changes: Any) -> InitSettings:
    plain = InitSettings(
        folder=folder,
        site=SITES,
        model=str(base / "model"),
        data=str(base / "{site}.jsonl"),
        template="{sentence} It was",
        words=(" terrible", " great"),
        batch_size=4,
        job="tiny",
        rounds=10,
        lr=0.05,
        perturbations=2,
    )
    return replace(plain, **changes)


def make_project(base: Path, folder: Path, **changes: Any) -> Path:
    """Writes a project whose sites take one thread and checkpoints more often than they need."""
    init_project(wanted(base, folder, **changes))
    for site in (folder / "sites").iterdir():
        change_site(site, threads=1, checkpoint_every=5)
    return folder


@pytest.fixture(scope="session")
def shared_project(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(base, tmp_path_factory.mktemp("shared") / "project")


@pytest.fixture
def project(shared_project: Path, tmp_path: Path) -> Path:
    """A copy of it for one test: making certificates takes longer."""
    return Path(shutil.copytree(shared_project, tmp_path / "project"))


def change_site(folder: Path, **changes: Any) -> None:
    SiteConfig.read(folder).model_copy(update=changes).write(folder)


def change_server(folder: Path, **changes: Any) -> ServerConfig:
    config = ServerConfig.read(folder).model_copy(update=changes)
    config.write(folder)
    return config
