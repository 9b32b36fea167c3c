"""What a client is predicted to take: weights to the byte, the rest from a calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zorba.apps.plan.calibration import Activations, Calibration
from zorba.apps.plan.footprint import footprint_of, make_model
from zorba.apps.plan.prediction import memory_model, predict
from zorba.apps.plan.workload import Workload
from zorba.hf import find_blocks
from zorba.offload import Offload
from zorba.planning import plan_blocks

from tests.hf.tiny import build, case_of, tiny_config

KINDS = ("label-words", "text")
MACHINE = Calibration(
    machine={},
    context=1000,
    activations={
        f"{idle} {loss}": Activations(
            stream=3.0, stream_square=0.0, block=50.0, block_square=0.5, head=90.0
        )
        for idle in ("offload", "resident")
        for loss in KINDS
    },
)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_the_model(kind: str, dtype: str) -> None:
    config: Any = tiny_config(kind)
    footprint = footprint_of(config, dtype)
    model = make_model(config, dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert footprint.block_names == tuple(block.name for block in find_blocks(model))
    assert footprint.blocks == tuple(block.nbytes for block in find_blocks(model))
    weights = sum(p.nbytes for p in model.parameters())
    assert footprint.total == weights + sum(b.nbytes for b in model.buffers())


def test_parts_of_an_offloaded_client(tmp_path: Path) -> None:
    footprint = footprint_of(tiny_config("llama"), "float32")
    model = build(case_of("llama"))
    work = Workload(batch_size=2, length=10, num_perturbations=3)
    parts = predict(footprint, MACHINE, work, [True, False, False])
    with Offload(model, ["model.layers.0"], folder=tmp_path) as offload:
        assert parts.buffers == offload.buffer_bytes
        on_device = {p.data_ptr(): p.nbytes for n, p in model.named_parameters() if _stays(n)}
    assert parts.weights - sum(b.nbytes for b in model.buffers()) == sum(on_device.values())
    assert parts.scratch >= max(p.nbytes for p in model.model.layers[0].parameters())
    # six evaluations wait, one block runs: 20 tokens, 10 positions each
    assert parts.activations == 6 * 3 * 20 + 50 * 20 + 0.5 * 20 * 10
    assert parts.context == 1000
    assert parts.total == sum(vars(parts).values())


def _stays(name: str) -> bool:
    return ".layers." not in name or ".layers.0." in name


def test_other_policies_and_losses() -> None:
    footprint = footprint_of(tiny_config("llama"), "float32")
    work = Workload(batch_size=2, length=10, num_perturbations=3, idle="resident")
    some = predict(footprint, MACHINE, work, [True, False, False])
    assert (some.weights, some.buffers) == (footprint.total, 0)
    assert some.activations == 3 * 20 + 50 * 20 + 0.5 * 20 * 10, "one evaluation at a time"
    every = predict(footprint, MACHINE, Workload(2, 10, 3), [True] * 3)
    assert (every.weights, every.buffers) == (footprint.total, 0), "nothing is idle"
    one_idle = predict(footprint, MACHINE, Workload(2, 10, 3), [True, True, False])
    assert one_idle.buffers == max(footprint.padded), "one idle block needs one buffer"
    text = predict(footprint, MACHINE, Workload(2, 10, 3, loss="text"), [True, False, False])
    assert text.activations == 6 * 3 * 20 + 90 * 20, "the logits are more than a block"


@pytest.mark.parametrize("idle", ["offload", "resident"])
def test_a_plan_is_never_above_what_it_says(idle: Any, rng: Any) -> None:
    """The planner's sums are those of each mask, or above."""
    footprint = footprint_of(tiny_config("llama"), "float32")
    work = Workload(batch_size=2, length=10, idle=idle)
    model = memory_model(footprint, MACHINE, work)
    for _ in range(20):
        mask = [bool(rng.integer(1)) for _ in range(3)]
        mask[int(rng.integer(16)) % 3] = True
        fixed = model.fixed_bytes(["a"])[0]
        sizes = zip(model.active, model.idle, mask, strict=True)
        planned = fixed + sum(on if active else off for on, off, active in sizes)
        if all(mask):
            planned = min(planned, model.all_active_bytes(["a"])[0])
        assert predict(footprint, MACHINE, work, mask).total <= planned


def test_a_client_with_room_for_the_whole_model_keeps_it() -> None:
    config: Any = tiny_config("llama")
    config.num_hidden_layers = 6
    footprint = footprint_of(config, "float32")
    work = Workload(batch_size=2, length=10)
    whole = predict(footprint, MACHINE, work, [True] * 6).total
    model = memory_model(footprint, MACHINE, work)
    small = model.fixed_bytes(["a"])[0] + max(footprint.blocks)
    plan = plan_blocks(model, {"large": whole, "small": small})
    assert plan.mask[0].all()
    assert plan.memory[0] == whole
    assert np.array_equal(plan.mask.sum(axis=1), [6, 1])


def test_what_does_not_fit_is_refused() -> None:
    footprint = footprint_of(tiny_config("llama"), "float32")
    with pytest.raises(ValueError, match="footprint is of float32, the workload bfloat16"):
        predict(footprint, MACHINE, Workload(dtype="bfloat16"), [True] * 3)
    for mask in ([True], [False] * 3):
        with pytest.raises(ValueError, match="must have 3 blocks, one of them active"):
            predict(footprint, MACHINE, Workload(), mask)
    with pytest.raises(ValueError, match="batch_size must be an integer, at least 1"):
        Workload(batch_size=0)
    with pytest.raises(ValueError, match="idle is 'elsewhere'"):
        Workload(idle="elsewhere")  # type: ignore[arg-type]
