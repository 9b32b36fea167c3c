"""Steps with idle blocks on the host against resident ones: equal bits first, then time and memory.

    python -m pytest benchmarks/bench_offload.py

On the CPU a model of SmolLM2-135M's shapes with 8 of 30 blocks active, whose idle blocks are in
files; on a GPU a larger one, whose idle blocks wait in page-locked memory. The logits of the last
position are read. Rademacher noise, central differences; active blocks are spread evenly.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zorba import ZerothOrderSGD
from zorba.hf import find_blocks
from zorba.hf.head import narrow_logits
from zorba.offload import Offload

import zorba_kernels as zk
from benchmarks.bench import Bench
from benchmarks.sizes import random_llama

STEPS = 3
SLOWER, MEMORY = 1.3, 0.6  # targets: time and device memory over those of a resident step


def model_of(bench: Bench, dtype: torch.dtype) -> tuple[Any, list[bool]]:
    config = bench.sizes.offload()
    layers, active = config.num_hidden_layers, bench.sizes.offload_active
    chosen = {(2 * i + 1) * layers // (2 * active) for i in range(active)}
    return random_llama(config, dtype, bench.device), [b in chosen for b in range(layers)]


def closure_of(model: Any, device: torch.device) -> Callable[[], Tensor]:
    """Returns the loss of 16 sequences of 32 tokens, over two answer words."""
    ids = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(1)).to(device)
    rows = torch.arange(16, device=device)
    last, words = torch.full_like(rows, 31), torch.tensor([100, 200], device=device)
    inputs = {"input_ids": ids, "use_cache": False}

    def closure() -> Tensor:
        logits = narrow_logits(model, inputs, rows, last, words)
        return nn.functional.cross_entropy(logits.float(), rows % 2)

    return closure


@contextmanager
def offloaded(model: nn.Module, mask: list[bool], device: torch.device) -> Iterator[None]:
    """Puts the idle blocks on the host, or into files of the current folder: on a disk."""
    active = [block.name for block, on in zip(find_blocks(model), mask, strict=True) if on]
    with (
        tempfile.TemporaryDirectory(dir=Path.cwd()) as folder,
        Offload(model, active, folder=None if device.type == "cuda" else Path(folder)),
    ):
        yield


def optimizer_of(model: nn.Module, mask: list[bool], **more: Any) -> ZerothOrderSGD:
    return ZerothOrderSGD(model, lr=1e-4, blocks=mask, distribution="rademacher", **more)


def step_of(model: nn.Module, mask: list[bool], device: torch.device) -> Callable[[], object]:
    return partial(optimizer_of(model, mask, seed=1).step, closure_of(model, device))


@pytest.fixture(autouse=True)
def greenlet() -> None:
    """Steps with idle blocks on the host need this package, which a GPU machine may lack."""
    pytest.importorskip("greenlet")


def bench_bits(bench: Bench) -> None:
    model, mask = model_of(bench, torch.bfloat16)
    closure, seed = closure_of(model, bench.device), bench.rng.getrandbits(64)
    bench.facts.update(blocks=len(mask), active=sum(mask))

    def steps() -> tuple[list[tuple[float, ...]], int]:
        optimizer = optimizer_of(model, mask, seed=seed, num_perturbations=2)
        scalars = []
        for _ in range(STEPS):
            optimizer.step(closure)
            scalars.append(optimizer.last_step.scalars)
        return scalars, zk.fingerprint(optimizer.placement.table)

    start = copy.deepcopy(model.state_dict())
    resident = steps()
    model.load_state_dict(start)
    with offloaded(model, mask, bench.device):
        assert steps() == resident


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_step(bench: Bench, dtype: torch.dtype) -> None:
    """Each step beside a resident one: the median of their ratios is what counts."""
    model, mask = model_of(bench, dtype)
    other = copy.deepcopy(model)
    with offloaded(other, mask, bench.device):
        models = {"resident": model, "offload": other}
        times = bench.in_turn({name: step_of(m, mask, bench.device) for name, m in models.items()})
    group = f"a step, {dtype}, {sum(mask)} of {len(mask)} blocks active"
    for name, t in times.items():
        ratio = t.over(times["resident"])
        bench.measure(group, name, ms=t.median * 1e3, least_ms=min(t.each) * 1e3, x=ratio)
    bench.target(group, ratio, "x resident", most=SLOWER)


@pytest.mark.gpu
def bench_memory(bench: Bench) -> None:
    """The most that is held on the device, weights and scratch among it; each model alone."""
    if bench.device.type != "cuda":
        pytest.skip("the allocator of a CPU keeps no count")
    peaks = {}
    for name in ("resident", "offload"):
        model, mask = model_of(bench, torch.bfloat16)
        with offloaded(model, mask, bench.device) if name == "offload" else nullcontext():
            torch.cuda.reset_peak_memory_stats()  # what making the model took does not count
            step = step_of(model, mask, bench.device)
            for _ in range(STEPS):
                step()
            peaks[name] = torch.cuda.max_memory_allocated() / 2**20
        del model, step
        bench.measure("device memory of a step", name, peak_mib=peaks[name])
    ratio = peaks["offload"] / peaks["resident"]
    bench.target("its device memory", ratio, "x resident", most=MEMORY)
