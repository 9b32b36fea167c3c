"""``zorba plan``: from a model and budgets to masks, with what each client will take."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.progress import track

from zorba.apps.command import plain_console
from zorba.apps.plan.calibration import calibrate, make_model, memory_model, read_config
from zorba.apps.plan.measure import measure_client
from zorba.apps.plan.settings import PlanSettings
from zorba.planning import draw_plan, plan_blocks
from zorba.sizes import show_bytes


def run_plan(settings: PlanSettings) -> None:
    """Plans, says what it came to, and writes ``plan.json`` and ``plan.png``."""
    console = plain_console()
    config = read_config(settings.model)
    own_dtype: Any = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    if settings.dtype == "auto":
        settings = replace(settings, dtype=own_dtype)
    overhead = calibrate(config, settings, console.print)
    memory = memory_model(config, settings, overhead)
    console.print(
        f"{config.model_type}: {len(memory.active)} blocks, {show_bytes(sum(memory.active))} of "
        f"weights in {settings.dtype}, idle blocks {settings.idle}\n"
        f"a client besides its blocks: {show_bytes(memory.fixed)}"
    )
    plan = plan_blocks(
        memory,
        settings.budgets,
        priorities=settings.priorities or None,
        min_coverage=settings.min_coverage,
        min_active=settings.min_active,
        max_active=settings.max_active,
        tolerance=settings.tolerance,
    )
    console.print(plan.render())
    masks = [tuple(row) for row in plan.mask.tolist()]
    measured: dict[tuple[bool, ...], int] = {}
    if settings.measure:
        with _weights(settings, own_dtype, config) as folder:
            # Each mask once, however many clients have it.
            for mask in track(list(dict.fromkeys(masks)), "measuring clients", transient=True):
                measured[mask] = measure_client(folder, mask, settings)
        for name, predicted, mask in zip(plan.clients, plan.memory, masks, strict=True):
            console.print(
                f"{name}: measured {show_bytes(measured[mask])}, predicted "
                f"{show_bytes(predicted)}, off by {predicted / measured[mask] - 1:+.1%}"
            )
    record = {
        "model": settings.model,
        "workload": settings.workload,
        "device": settings.device,
        "memory_model": asdict(memory),
        "overhead": overhead,
        "coverage": plan.coverage,
        "gap": plan.point.gap,
        "measured": [measured.get(mask) for mask in masks],
    }
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "plan.json").write_text(json.dumps(plan.record() | record, indent=1) + "\n")
    draw_plan(plan, settings.out / "plan.png")
    console.print(f"wrote {settings.out / 'plan.json'} and plan.png")


@contextmanager
def _weights(settings: PlanSettings, own_dtype: str, config: Any) -> Iterator[str]:
    """Gives a folder with the model in the workload's dtype; random weights where it has none."""
    from transformers import AutoModelForCausalLM

    has_weights = any(Path(settings.model).glob("*.safetensors"))
    if has_weights and own_dtype == settings.dtype:
        yield settings.model
        return
    with tempfile.TemporaryDirectory(prefix="weights-") as folder:
        # As a client's own checkpoint would be: one of another dtype could not be mapped.
        if has_weights:
            source: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype=settings.dtype)
        else:
            source = make_model(config, settings.dtype)
        source.save_pretrained(folder)
        del source
        yield folder
