"""``zorba plan``: from a model and budgets to masks, with what each client will take."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from zorba.apps.command import plain_console
from zorba.apps.plan.calibration import Calibration, calibrate
from zorba.apps.plan.footprint import Footprint, footprint_of, make_model, read_config
from zorba.apps.plan.measure import measure_client
from zorba.apps.plan.prediction import Parts, memory_model, predict
from zorba.apps.plan.settings import PlanSettings
from zorba.apps.plan.workload import Workload
from zorba.planning.picture import draw_plan
from zorba.planning.plan import BlockPlan
from zorba.planning.planner import plan_blocks
from zorba.sizes import show_bytes


def run_plan(settings: PlanSettings, console: Console | None = None) -> dict[str, Any]:
    """Plans, says what it came to, and returns what ``plan.json`` holds.

    Raises:
        InfeasiblePlanError: no mask fits the budgets.
        ValueError: settings or a model that do not fit.
        RuntimeError: a client that was measured failed.
        OSError: a file that cannot be read or written.
    """
    console = console or plain_console()
    config = read_config(settings.model)
    workload = _workload(settings, config)
    footprint = footprint_of(config, workload.dtype)
    console.print(_describe(footprint, workload), highlight=False)
    calibration = calibrate(
        config, workload.dtype, settings.calibration, settings.device, console.print
    )
    plan = plan_blocks(
        memory_model(footprint, calibration, workload),
        settings.budgets,
        priorities=settings.priorities or None,
        min_coverage=settings.min_coverage,
        min_active=settings.min_active,
        max_active=settings.max_active,
        tolerance=settings.tolerance,
    )
    console.print(plan.render(), highlight=False)
    predicted = [predict(footprint, calibration, workload, row) for row in plan.mask.tolist()]
    measured: list[int | None] = [None] * len(predicted)
    if settings.measure:
        measured = _measure(settings, workload, config, plan)
    console.print(_table(plan, predicted, measured))
    record = _record(settings, workload, footprint, calibration, plan, predicted, measured)
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "plan.json").write_text(json.dumps(record, indent=1) + "\n")
    draw_plan(plan, settings.out / "plan.png")
    console.print(f"wrote {settings.out / 'plan.json'} and plan.png", highlight=False)
    return record


def _workload(settings: PlanSettings, config: Any) -> Workload:
    """Returns the step to plan for; a dtype of "auto" is that of the model."""
    dtype: str = settings.dtype
    if dtype == "auto":
        dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return Workload(
        batch_size=settings.batch_size,
        length=settings.length,
        num_perturbations=settings.perturbations,
        estimator=settings.estimator,
        loss=settings.loss,
        dtype=dtype,
        idle=settings.idle,
    )


def _describe(footprint: Footprint, workload: Workload) -> str:
    return (
        f"{footprint.name}: {len(footprint.blocks)} blocks, {show_bytes(footprint.total)} of "
        f"weights in {footprint.dtype}, {show_bytes(footprint.rest)} of them outside the blocks\n"
        f"a step: {workload.batch_size} x {workload.length} tokens, {workload.evaluations} "
        f"evaluations, loss of {workload.loss}, idle blocks {workload.idle}"
    )


def _measure(
    settings: PlanSettings, workload: Workload, config: Any, plan: BlockPlan
) -> list[int | None]:
    """Measures each mask once, in a process of its own."""
    seen: dict[bytes, int] = {}
    with _weights(settings, workload.dtype, config) as folder:
        for row in track(plan.mask, "measuring clients", transient=True):
            if row.tobytes() not in seen:
                apart = measure_client(
                    folder, row.tolist(), workload, settings.out, settings.device
                )
                on_cpu = settings.device == "cpu"
                seen[row.tobytes()] = apart.above if on_cpu else apart.device_peak
    return [seen[row.tobytes()] for row in plan.mask]


@contextmanager
def _weights(settings: PlanSettings, dtype: str, config: Any) -> Iterator[str]:
    """Gives a folder with the model in the workload's dtype; random weights where it has none."""
    from transformers import AutoModelForCausalLM

    settings.out.mkdir(parents=True, exist_ok=True)
    folder = Path(settings.model)
    has_weights = folder.is_dir() and any(folder.glob("*.safetensors"))
    if has_weights and str(config.dtype).removeprefix("torch.") == dtype:
        yield str(folder)
        return
    with tempfile.TemporaryDirectory(dir=settings.out, prefix="weights-") as scratch:
        # As a client's own checkpoint would be: one of another dtype could not be mapped.
        source: Any
        if has_weights:
            source = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        else:
            source = make_model(config, dtype)
        source.save_pretrained(scratch)
        del source
        yield scratch


def _table(plan: BlockPlan, predicted: list[Parts], measured: list[int | None]) -> Table:
    title = "MiB that a client takes, above its imports"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("client", no_wrap=True)
    columns = ["active", "weights", "buffers", "activ.", "context", "predicted"]
    if any(measured):
        columns += ["measured", "off by"]
    for name in [*columns, "budget"]:
        table.add_column(name, justify="right", no_wrap=True)
    for n, (name, parts, peak) in enumerate(zip(plan.clients, predicted, measured, strict=True)):
        cells = [str(int(plan.mask[n].sum()))]
        buffers = parts.buffers + parts.scratch
        shown = (parts.weights, buffers, parts.activations, parts.context, parts.total)
        cells += [_mib(value) for value in shown]
        if peak:
            cells += [_mib(peak), f"{parts.total / peak - 1:+.1%}"]
        table.add_row(name, *cells, _mib(plan.budgets[n]))
    return table


def _mib(count: int) -> str:
    return f"{count / (1 << 20):,.1f}"


def _record(
    settings: PlanSettings,
    workload: Workload,
    footprint: Footprint,
    calibration: Calibration,
    plan: BlockPlan,
    predicted: list[Parts],
    measured: list[int | None],
) -> dict[str, Any]:
    return {
        "model": settings.model,
        "workload": asdict(workload),
        "device": settings.device,
        "footprint": asdict(footprint),
        "calibration": asdict(calibration),
        "version": f"{plan.version:016x}",
        "blocks": plan.blocks,
        "coverage": plan.coverage,
        "f1": plan.point.f1,
        "f2": plan.point.f2,
        "gap": plan.point.gap,
        "clients": {
            name: {
                "budget": plan.budgets[n],
                "mask": "".join("1" if on else "0" for on in plan.mask[n]),
                "planned": plan.memory[n],
                "predicted": predicted[n].total,
                "parts": asdict(predicted[n]),
                "measured": measured[n],
            }
            for n, name in enumerate(plan.clients)
        },
        "front": [
            {"f1": p.f1, "f2": p.f2, "memory": p.memory, "chosen": i == plan.chosen}
            for i, p in enumerate(plan.front)
        ],
    }
