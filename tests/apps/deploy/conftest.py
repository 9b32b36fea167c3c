"""Fixtures of the deployment's tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from zorba.apps.deploy.config import SiteConfig
from zorba.apps.deploy.project import ProjectSettings

from tests.apps.finetune.tiny import ROWS, save_tiny_llama

SITES = ("ada", "bob", "cleo")


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, and rows of each site, of which no two have the same."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny_llama(folder / "model", torch.float32)
    for number, site in enumerate(SITES):
        rows = [row for at, row in enumerate(ROWS) if at % len(SITES) != number]
        (folder / f"{site}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def describe(base: Path, folder: Path, **changes: Any) -> ProjectSettings:
    """What a project of three sites is made from."""
    site = SiteConfig(
        name="",
        model=str(base / "model"),
        data=str(base / "{site}.jsonl"),
        template="{sentence} It was",
        words=(" terrible", " great"),
        batch_size=4,
        threads=1,
        checkpoint_every=5,
    )
    defaults: dict[str, Any] = {
        "folder": folder,
        "job": "tiny",
        "budgets": dict.fromkeys(SITES, 0),
        "address": "localhost:8002",
        "site": site,
        "rounds": 10,
        "settings": {"lr": 0.05, "num_perturbations": 2},
    }
    return ProjectSettings(**(defaults | changes))
