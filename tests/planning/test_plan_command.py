"""``zorba plan``, from a folder to plan.json and a picture; and how near it comes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zorba.apps.plan import calibration
from zorba.apps.plan.calibration import memory_model
from zorba.apps.plan.settings import PlanSettings
from zorba.offload import Offload
from zorba.planning import plan_blocks

from benchmarks.sizes import llama_config
from tests.command import Result, zorba
from tests.hf.tiny import build, case_of, tiny_config

MIB = 1 << 20


def plan(model: Path, out: Path, *options: object) -> Result:
    return zorba(
        *("plan", model, "--batch-size", 4, "--length", 32, "--out", out),
        *("--calibration", model / "calibration.json", *options),
    )


@pytest.mark.parametrize(
    ("idle", "active"), [("offload", 4), ("resident", 8)], ids=["offload", "resident"]
)
def test_predicts_what_is_measured(tmp_path: Path, idle: str, active: int) -> None:
    """docs/planning.md: within 3 %. The model has 66 MiB, 6.8 of them in each of 8 blocks."""
    model, out = tmp_path / "model", tmp_path / "out"
    llama_config(8, 384, 1024, 4096).save_pretrained(model)
    options = ("--dtype", "float32", "--idle", idle, "--max-active", active)
    first = plan(model, out, *options, "--budgets", "a=1GB,b=1GB", "--min-coverage", 1, "--measure")
    assert first.exit_code == 0, first.output
    assert "calibrating" in first.output
    record = json.loads((out / "plan.json").read_text())
    assert (out / "plan.png").read_bytes()[:4] == b"\x89PNG"
    for name, client in record["clients"].items():
        assert client["mask"].count("1") == active
        assert client["measured"] > 40 * MIB, "weights were not counted"
        assert client["predicted"] == pytest.approx(client["measured"], rel=0.03), first.output
        assert f"{name}: measured" in first.output

    needed = record["clients"]["a"]["predicted"]
    short = plan(model, tmp_path / "short", *options, "--budgets", f"phone={needed // 9},desk=1GB")
    assert short.exit_code == 1
    told = short.output.replace("\n", " ")
    assert "client 'phone'" in told
    assert "bytes short" in told
    assert "calibrating" not in short.output, "it was kept"
    assert not (tmp_path / "short").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--budgets", "lots"], "is no number of bytes"),
        (["--budgets", "1GB", "--dtype", "int8"], "invalid choice 'int8' for argument '--dtype'"),
        (["--budgets", "1GB", "--idle", "gone"], "invalid choice 'gone' for argument '--idle'"),
    ],
)
def test_refused(tmp_path: Path, options: list[str], told: str) -> None:
    result = plan(tmp_path, tmp_path / "refused", *options)
    assert result.exit_code == 2
    assert told in result.text
    assert not (tmp_path / "refused").exists()


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = zorba("plan", tmp_path / "nothing", "--budgets", "1GB", "--out", tmp_path)
    assert result.exit_code == 1
    assert "has no config of a model" in result.output.replace("\n", " ")


def settings_of(**options: Any) -> PlanSettings:
    return PlanSettings("model", {"a": 1}, **({"dtype": "float32"} | options))


def test_an_offloaded_client_is_counted_as_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_OBJECTS", (0, 0))
    memory = memory_model(tiny_config("llama"), settings_of(), (1000, 900))
    model = build(case_of("llama"))
    with Offload(model, ["model.layers.0"], folder=tmp_path) as offload:
        parameters = model.named_parameters()
        on_device = sum(p.nbytes for n, p in parameters if not n.startswith(offload.idle))
        scratch = max(p.nbytes for p in model.model.layers[0].parameters())
        counted = on_device + offload.buffer_bytes + scratch + 1000
    # Buffers and scratch align each parameter: a few bytes more.
    assert memory.bytes_of([True, False, False]) == pytest.approx(counted, rel=0.02)
    total = sum(p.nbytes for p in model.parameters())
    assert memory.bytes_of([True] * 3) == pytest.approx(total + scratch + 900, rel=0.02)


def test_a_client_with_room_for_the_whole_model_keeps_it() -> None:
    config: Any = tiny_config("llama")
    config.num_hidden_layers = 6
    memory = memory_model(config, settings_of(), (0, 0))
    whole = memory.bytes_of([True] * 6)
    chosen = plan_blocks(memory, {"large": whole, "small": memory.bytes_of([True] + [False] * 5)})
    assert np.array_equal(chosen.mask.sum(axis=1), [6, 1])
    assert chosen.memory[0] == whole
    resident = memory_model(config, settings_of(idle="resident"), (0, 0))
    assert resident.active == resident.idle, "masks save nothing"
