"""Steps with idle blocks on the host: the bits of resident ones, device memory, and time."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zorba_kernels as zk
from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.serving import fresh
from benchmarks.gpu_check.sizes import Sizes
from benchmarks.gpu_check.timing import release, time_in_turn

STEPS = 3
SLOWER = 1.3  # target: a step with idle blocks on the host over one without


def run(report: Report, device: torch.device, sizes: Sizes) -> None:
    if importlib.util.find_spec("greenlet") is None:
        report.note(**{"offload, left out": "the package greenlet is not installed"})
        return
    seed = fresh(report).getrandbits(64)
    model, mask = make_model(sizes, device)
    closure = make_closure(model, device)
    with report.check("offloaded steps = resident steps", blocks=len(mask), active=sum(mask)):
        start = copy.deepcopy(model.state_dict())
        resident = steps(model, closure, mask, seed)
        model.load_state_dict(start)
        with offloaded(model, mask, device):
            found = steps(model, closure, mask, seed)
        if found != resident:
            raise AssertionError(f"scalars and fingerprint: {found}, resident: {resident}")
        model.load_state_dict(start)
    with report.part("time and memory of steps"):
        measure(report, model, closure, mask, device, sizes.runs)


def make_model(sizes: Sizes, device: torch.device) -> tuple[nn.Module, list[bool]]:
    """A Llama in bfloat16 with a quarter of its blocks active, the last one among them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, inner = sizes.offload
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), num_key_value_heads=max(1, width // 64),
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).eval(), [b % 4 == 3 for b in range(layers)]


def make_closure(model: Any, device: torch.device) -> Callable[[], torch.Tensor]:
    ids = torch.randint(0, 256, (16, 128), device=device)

    def closure() -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    return closure


@contextmanager
def offloaded(model: nn.Module, mask: list[bool], device: torch.device) -> Iterator[None]:
    from zorba.hf import find_blocks
    from zorba.offload import Offload

    active = [block.name for block, on in zip(find_blocks(model), mask, strict=True) if on]
    with tempfile.TemporaryDirectory() as folder:
        # On a GPU idle blocks wait in page-locked memory; the rehearsal needs files.
        place = None if device.type == "cuda" else Path(folder)
        with Offload(model, active, folder=place):
            yield


def optimizer_of(model: nn.Module, mask: list[bool], seed: int) -> Any:
    from zorba import ZerothOrderSGD

    return ZerothOrderSGD(
        model, lr=1e-4, blocks=mask, seed=seed, distribution="rademacher", num_perturbations=2
    )


def steps(
    model: nn.Module, closure: Callable[[], torch.Tensor], mask: list[bool], seed: int
) -> tuple[list[tuple[float, ...]], int]:
    """Scalars of some steps, and the fingerprint that they end with."""
    optimizer = optimizer_of(model, mask, seed)
    scalars = []
    for _ in range(STEPS):
        optimizer.step(closure)
        scalars.append(optimizer.last_step.scalars)
    return scalars, zk.fingerprint(optimizer.placement.table)


def measure(
    report: Report,
    model: nn.Module,
    closure: Callable[[], torch.Tensor],
    mask: list[bool],
    device: torch.device,
    runs: int,
) -> None:
    def timed(name: str) -> Any:
        optimizer = optimizer_of(model, mask, 1)
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
        (t,) = time_in_turn(
            {name: lambda: optimizer.step(closure)}, device, runs, seconds=report.left() / 2
        ).values()
        figures = {"ms": t.median * 1e3, "least_ms": t.least * 1e3, "most_ms": t.most * 1e3}
        if held is not None and t.extra_bytes is not None:
            figures["peak_mib"] = (held + t.extra_bytes) / 2**20
        report.measure(f"a step, {sum(mask)} of {len(mask)} blocks active", name, **figures)
        release(device)
        return figures

    resident = timed("resident")
    with offloaded(model, mask, device):
        release(device)
        host = timed("offload")
    ratio = host["ms"] / resident["ms"]
    report.target("a step with idle blocks on the host", ratio, SLOWER, "x resident", least=False)
    if "peak_mib" in host:
        share = host["peak_mib"] / resident["peak_mib"]
        report.target("its device memory", share, 0.6, "x resident", least=False)
