"""``zorba plan``, from a folder to plan.json and a picture; and how near it comes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zorba.apps.plan import calibration, command
from zorba.apps.plan.calibration import calibrate, make_model, memory_model
from zorba.apps.plan.measure import measure_client
from zorba.apps.plan.settings import PlanSettings
from zorba.offload import Offload
from zorba.planning import plan_blocks

from benchmarks.sizes import llama_config
from tests.command import Result, zorba
from tests.hf.tiny import build, case_of, tiny_config

MIB = 1 << 20


def settings_of(model: Path | str = "model", **options: Any) -> PlanSettings:
    return PlanSettings(str(model), {"a": 1}, **({"dtype": "float32"} | options))


@pytest.mark.parametrize("idle", ["offload", "resident"])
def test_predicts_what_is_measured(tmp_path: Path, idle: Any, full: bool) -> None:
    """docs/planning.md: within 3 %. The model has 46 MiB, 6.8 of them in each of 6 blocks."""
    if idle == "resident" and not full:
        pytest.skip("three processes that import everything: only with --full")
    config = llama_config(6, 384, 1024, 2048)
    make_model(config, "float32").save_pretrained(tmp_path)
    options = {"calibration": tmp_path / "calibration", "batch_size": 2, "length": 16}
    settings = settings_of(tmp_path, idle=idle, **options)
    mask = [True, False] * 3 if idle == "offload" else [True] * 6
    predicted = memory_model(config, settings, calibrate(config, settings, print)).bytes_of(mask)
    measured = measure_client(tmp_path, mask, settings)
    assert measured > 35 * MIB, "weights were not counted"
    assert predicted == pytest.approx(measured, rel=0.03)


def plan(model: Path, out: Path, *options: object) -> Result:
    return zorba("plan", model, "--out", out, "--calibration", model / "calibration", *options)


def test_writes_a_plan_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[bool, ...]] = []

    def measure(folder: str, mask: tuple[bool, ...], settings: PlanSettings) -> int:
        measured.append(mask)
        return 64 * MIB

    for module in (calibration, command):
        monkeypatch.setattr(module, "measure_client", measure)
    model, out = tmp_path / "model", tmp_path / "out"
    tiny_config("llama").save_pretrained(model)
    options = ("--max-active", 2, "--measure", "--budgets")
    first = plan(model, out, *options, "a=1GB,b=1GB,c=1GB")
    assert first.exit_code == 0, first.output
    assert "calibrating" in first.output
    assert (out / "plan.png").read_bytes()[:4] == b"\x89PNG"
    record = json.loads((out / "plan.json").read_text())
    masks = record["mask"]
    assert [mask.count("1") for mask in masks] == [2, 2, 2]
    assert len(measured) == 2 + len(set(masks)), "each mask once"
    assert record["measured"] == [64 * MIB] * 3
    for name in record["clients"]:
        assert f"{name}: measured 64.0 MiB" in first.output

    short = plan(model, tmp_path / "short", *options, "phone=1kB,desk=1GB")
    assert short.exit_code == 1
    assert "client 'phone'" in short.text
    assert "bytes short" in short.text
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
    assert "has no config of a model" in result.text


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
