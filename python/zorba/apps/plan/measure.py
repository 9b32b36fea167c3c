"""The peak memory of a client, measured: a federation of one, in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zorba.apps.command import hide_library_bars
from zorba.apps.plan.workload import Workload
from zorba.machine import GIVING_BACK, Apart, run_apart

# The first step finds out how the model uses its weights; the update of the last rides on no plan.
_ROUNDS = 3


def measure_client(
    model: str | Path,
    mask: Sequence[bool],
    workload: Workload,
    scratch: str | Path | None = None,
    device: str = "cpu",
) -> Apart[float]:
    """Runs some rounds of a client in a process of its own, on random tokens.

    Args:
        model: folder of a causal language model, saved in the workload's dtype.
        mask: which blocks are active.
        workload: what it computes.
        scratch: folder for idle blocks, on a disk; a temporary one by default.
        device: "cpu" or "cuda".

    Returns:
        Its memory, and the mean loss as the result. The baseline is that of the imports.
    """
    where = None if scratch is None else str(scratch)
    arguments = (str(model), tuple(mask), workload, where, device)
    return run_apart(_run, *arguments, environment=GIVING_BACK)


def _run(
    ready: Callable[[], None],
    folder: str,
    mask: tuple[bool, ...],
    workload: Workload,
    scratch: str | None,
    device: str,
) -> float:
    from transformers import AutoConfig, AutoModelForCausalLM

    from zorba import federated, offload  # noqa: F401
    from zorba.hf import find_blocks

    hide_library_bars()
    config = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM._model_mapping[type(config)]  # imports the architecture
    ready()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, workload.dtype))
    model.eval().requires_grad_(False)
    with ExitStack() as stack:
        names = [block.name for block in find_blocks(model)]
        active = [name for name, on in zip(names, mask, strict=True) if on]
        if workload.idle == "offload":
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=scratch)))
            folder_ = path if device == "cpu" else None
            # Never closed, which would bring all blocks to the device: the process ends instead.
            offload.Offload(model, active, device, folder_)
        else:
            own_memory(model, device)
        return run_rounds(model, mask, workload, stack)


def own_memory(model: nn.Module, device: str) -> None:
    """Brings a model to a device; on the CPU, from a mapped file to memory of its own."""
    if device != "cpu":
        model.to(device)
        return
    for p in model.parameters():
        p.data = p.data.clone()


def run_rounds(
    model: Any, mask: Sequence[bool], workload: Workload, stack: ExitStack, rounds: int = _ROUNDS
) -> float:
    """Runs a federation of one client on random tokens; returns the mean loss of the last round."""
    from zorba.federated import (
        Client,
        FederationSettings,
        LocalTransport,
        ModelObjective,
        Replica,
        Server,
        model_fingerprint,
        run_federation,
    )
    from zorba.hf import find_blocks
    from zorba.tables import DeviceTables

    blocks = find_blocks(model)
    groups = {name: b for b, block in enumerate(blocks) for name in block.parameters}
    parameters = {name: p for name, p in model.named_parameters() if name in groups}
    table = DeviceTables(parameters, groups)
    replica = Replica(table, model_fingerprint(model.named_parameters()))
    objective = ModelObjective(
        model, table, batches_of(model, workload), loss_of(model, workload), "gaussian"
    )
    settings = FederationSettings(
        "measure",
        0,
        lr=0.0,
        num_perturbations=workload.num_perturbations,
        estimator=workload.estimator,
    )
    log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log"
    server = Server(settings, replica.identity, ["client"], torch.tensor([list(mask)]).numpy(), log)
    client = Client("client", replica, objective)
    result = run_federation(server, LocalTransport({"client": client}), rounds)
    server.close()
    if result.failures or result.reports[-1].failures:
        raise RuntimeError(f"the client failed: {result.reports[-1].failures or result.failures}")
    return result.reports[-1].loss


def batches_of(
    model: Any, workload: Workload
) -> Callable[[int, int], tuple[dict[str, Tensor], int]]:
    """Returns random batches; all but one sequence end in padding, where a loss masks it."""
    vocabulary = model.get_input_embeddings().num_embeddings
    device = model.get_input_embeddings().weight.device

    def batch(round_number: int, step: int) -> tuple[dict[str, Tensor], int]:
        generator = torch.Generator().manual_seed(round_number)
        shape = (workload.batch_size, workload.length)
        ids = torch.randint(vocabulary, shape, generator=generator)
        inputs = {"input_ids": ids}
        if workload.loss == "text":
            attention = torch.ones_like(ids)
            attention[1:, -1] = 0
            inputs["attention_mask"] = attention
            inputs["labels"] = ids.masked_fill(attention == 0, -100)
        return {name: value.to(device) for name, value in inputs.items()}, workload.batch_size

    return batch


def loss_of(model: Any, workload: Workload) -> Callable[[dict[str, Tensor]], Tensor]:
    """Returns the loss of a batch: of two label words, or of the text."""
    from zorba.hf import narrow_logits

    def text(batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = model(**batch, use_cache=False).loss
        return loss

    def label_words(batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        rows = torch.arange(len(ids), device=ids.device)
        last = torch.full_like(rows, ids.shape[1] - 1)
        words = torch.tensor([0, 1], device=ids.device)
        logits = narrow_logits(model, {**batch, "use_cache": False}, rows, last, words)
        return nn.functional.cross_entropy(logits, rows % 2)

    return text if workload.loss == "text" else label_words
