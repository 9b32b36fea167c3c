"""``zorba plan``, from a folder to plan.json and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command import Result, zorba
from tests.hf.tiny import build, case_of


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, and a calibration once the first plan was made."""
    folder = tmp_path_factory.mktemp("plan")
    model: Any = build(case_of("llama"))
    model.save_pretrained(folder / "model")
    return folder


def plan(world: Path, out: str, *options: object) -> Result:
    return zorba(
        *("plan", world / "model", "--batch-size", 2, "--length", 8, "--perturbations", 1),
        *("--calibration", world / "calibration.json", "--out", world / out, *options),
    )


def test_plan_measure_and_calibrate_once(world: Path, threads: None) -> None:
    torch.set_num_threads(1)
    first = plan(world, "first", "--budgets", "a=1GB,b=1GB", "--measure")
    assert first.exit_code == 0, first.output
    assert "calibrating" in first.output
    record = json.loads((world / "first" / "plan.json").read_text())
    assert {name: c["mask"] for name, c in record["clients"].items()} == {"a": "111", "b": "111"}
    assert all(c["measured"] > 0 and c["predicted"] > 0 for c in record["clients"].values())
    assert (world / "first" / "plan.png").read_bytes()[:4] == b"\x89PNG"
    assert not [p for p in (world / "first").iterdir() if p.name.startswith("weights-")]

    needed = record["clients"]["a"]["predicted"]
    short = plan(world, "short", "--budgets", f"phone={needed // 1000},desk=1GB")
    assert short.exit_code == 1
    told = short.output.replace("\n", " ")
    assert "client 'phone'" in told
    assert "bytes short" in told
    assert "calibrating" not in short.output
    assert not (world / "short").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--budgets", "lots"], "is no number of bytes"),
        (["--budgets", "1GB", "--dtype", "int8"], "invalid choice 'int8' for argument '--dtype'"),
        (["--budgets", "1GB", "--idle", "gone"], "invalid choice 'gone' for argument '--idle'"),
    ],
)
def test_refused(world: Path, options: list[str], told: str) -> None:
    result = plan(world, "refused", *options)
    assert result.exit_code == 2
    assert told in result.text
    assert not (world / "refused").exists()


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = zorba("plan", tmp_path / "nothing", "--budgets", "1GB", "--out", tmp_path)
    assert result.exit_code == 1
    assert "has no config of a model" in result.output.replace("\n", " ")
