"""The peak memory of a client, measured: a federation of one, in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from zorba import federated
from zorba.apps.command import hide_library_bars
from zorba.apps.plan.settings import PlanSettings
from zorba.hf import find_blocks, narrow_logits
from zorba.machine import GIVING_BACK, run_apart
from zorba.offload import Offload
from zorba.tables import DeviceTables

# The first step finds out how the model uses its weights; the update of the last rides on no plan.
_ROUNDS = 3


def measure_client(folder: str | Path, mask: Sequence[bool], settings: PlanSettings) -> int:
    """Runs rounds of a client with a mask, bool [B]; returns the most bytes that it took.

    The folder has a causal language model in the workload's dtype. On the CPU the bytes are
    anonymous memory above the imports, on a GPU what torch's allocator held.
    """
    seen = run_apart(_run, str(folder), tuple(mask), settings, environment=GIVING_BACK)
    return seen.above if settings.device == "cpu" else seen.device_peak


def _run(
    ready: Callable[[], None], folder: str, mask: tuple[bool, ...], settings: PlanSettings
) -> None:
    hide_library_bars()
    models: Any = AutoModelForCausalLM
    models._model_mapping[type(AutoConfig.from_pretrained(folder))]  # imports the architecture
    ready()
    model = models.from_pretrained(folder, dtype=getattr(torch, settings.dtype))
    model.eval().requires_grad_(False)
    blocks = find_blocks(model)
    with tempfile.TemporaryDirectory() as scratch:
        if settings.idle == "offload":
            active = [block.name for block, on in zip(blocks, mask, strict=True) if on]
            idle = Path(scratch, "idle") if settings.device == "cpu" else None
            # Never closed, which would bring all blocks to the device: the process ends instead.
            Offload(model, active, settings.device, idle)
        else:
            own_memory(model, settings.device)
        groups = {name: b for b, block in enumerate(blocks) for name in block.parameters}
        table = DeviceTables({n: p for n, p in model.named_parameters() if n in groups}, groups)
        replica = federated.Replica(table, federated.model_fingerprint(model.named_parameters()))
        batches, loss = partial(_batch, model, settings), partial(_loss, model, settings)
        objective = federated.ModelObjective(model, table, batches, loss, "gaussian")
        steps: Any = {"num_perturbations": settings.perturbations, "estimator": settings.estimator}
        wanted = federated.FederationSettings("measure", 0, lr=0.0, **steps)
        clients, log = ["client"], Path(scratch, "log")
        server = federated.Server(wanted, replica.identity, clients, np.array([mask]), log)
        client = federated.Client("client", replica, objective)
        transport = federated.LocalTransport({"client": client})
        result = federated.run_federation(server, transport, _ROUNDS)
        server.close()
    if failures := result.reports[-1].failures or result.failures:
        raise RuntimeError(f"the client failed: {failures}")


def own_memory(model: nn.Module, device: str) -> None:
    """Brings a model to a device; on the CPU, from a mapped file to memory of its own."""
    if device != "cpu":
        model.to(device)
        return
    for p in model.parameters():
        p.data = p.data.clone()


def _batch(
    model: Any, settings: PlanSettings, round_number: int, step: int
) -> tuple[dict[str, Tensor], int]:
    """Returns random text; all but one sequence end in padding, where a loss masks it."""
    words = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(round_number)
    shape = (settings.batch_size, settings.length)
    ids = torch.randint(words.num_embeddings, shape, generator=generator)
    inputs = {"input_ids": ids}
    if settings.loss == "text":
        inputs["attention_mask"] = seen = torch.ones_like(ids)
        seen[1:, -1] = 0
        inputs["labels"] = ids.masked_fill(seen == 0, -100)
    return {name: value.to(words.weight.device) for name, value in inputs.items()}, len(ids)


def _loss(model: Any, settings: PlanSettings, batch: dict[str, Tensor]) -> Tensor:
    """Returns the loss of a batch: of the text, or of two label words."""
    if settings.loss == "text":
        loss: Tensor = model(**batch, use_cache=False).loss
        return loss
    rows = torch.arange(settings.batch_size, device=batch["input_ids"].device)
    last = torch.full_like(rows, settings.length - 1)
    words = torch.tensor([0, 1], device=rows.device)
    logits = narrow_logits(model, {**batch, "use_cache": False}, rows, last, words)
    return nn.functional.cross_entropy(logits, rows % 2)
