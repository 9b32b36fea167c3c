"""Puts the demo's federation together: data, model, plan, replicas, clients and server."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from zorba.apps.demo.settings import APART, DemoSettings
from zorba.apps.reviews import data
from zorba.apps.reviews.task import HeldOut, Pool, Seconds, Suffix, prefix_of
from zorba.federated import (
    Client,
    FederationSettings,
    Replica,
    RunFolder,
    Server,
    model_fingerprint,
)
from zorba.hf import Block, find_blocks
from zorba.planning import BlockPlan, MemoryModel, model_weights_memory, plan_blocks

_EVALUATION_BATCH = 64
_LEAST_EACH = 8  # sentences of each label that every client gets


@dataclass
class Federation:
    """Everything that a run of the demo holds."""

    clients: dict[str, Client]
    pools: dict[str, Pool]  # of each client
    server: Server
    plan: BlockPlan
    suffixes: dict[str, Suffix]  # the shared replica's and the one of the client apart
    replicas: dict[str, Replica]
    held_out: HeldOut
    seconds: Seconds
    cached_bytes: int  # hidden states of the clients' pools


def read_data(
    settings: DemoSettings, reviews: Path, sst2: Path, tokenizer: Any
) -> tuple[list[list[data.Example]], list[list[data.Example]]]:
    """Returns each client's examples, and the evaluation set in batches of similar length."""
    held_out = data.read_sst2(sst2)
    rows = data.drop_leaks(data.read_rotten_tomatoes(reviews), held_out)
    examples = [e for e in data.tokenise(rows, tokenizer) if len(e.ids) <= settings.longest]
    parts = data.split_clients(
        [e.label for e in examples],
        len(settings.clients),
        settings.alpha,
        settings.pool,
        _LEAST_EACH,
        np.random.default_rng(settings.seed),
    )
    evaluation = data.batches_by_length(data.tokenise(held_out, tokenizer), _EVALUATION_BATCH)
    return [[examples[i] for i in part] for part in parts], list(evaluation)


def room_for_blocks(
    model: nn.Module, blocks: Sequence[Block], counts: Mapping[str, int]
) -> tuple[MemoryModel, dict[str, int]]:
    """Returns what blocks take that wait on the host while idle, and budgets that fit so many.

    Where all blocks are resident, as in a federation in one process, it is no measurement.

    Args:
        model: whose other blocks are frozen.
        blocks: that are trained, of one size.
        counts: how many each client has room for, and half a block to spare.
    """
    memory = model_weights_memory(model, blocks, idle="offload")
    room = blocks[0].nbytes
    fixed = memory.fixed_bytes(list(counts))
    return memory, {
        name: base + (2 * min(count, len(blocks)) + 1) * room // 2
        for (name, count), base in zip(counts.items(), fixed, strict=True)
    }


def build(
    settings: DemoSettings,
    model: Any,
    parts: list[list[data.Example]],
    evaluation: list[list[data.Example]],
    answers: list[int],
    on_batch: Callable[[], None],
) -> Federation:
    """Caches the frozen prefixes and makes replicas, clients and the server.

    Args:
        settings: the knobs.
        model: a causal language model with a final norm ``model.model.norm``.
        parts: each client's examples.
        evaluation: batches of the held-out set.
        answers: token ids of the answer words of label 0 and 1.
        on_batch: called after each batch whose prefix was computed.
    """
    blocks = find_blocks(model)
    if not 1 <= settings.trainable <= len(blocks):
        raise ValueError(f"trainable is {settings.trainable}; the model has {len(blocks)} blocks")
    trainable = blocks[-settings.trainable :]
    chosen = plan_blocks(*room_for_blocks(model, trainable, settings.clients))
    door = trainable[0].module
    names = [block.parameters for block in trainable]
    head = model.get_output_embeddings().weight.detach()[answers].clone()
    origin = model_fingerprint(model.named_parameters())

    shared = Suffix(
        [b.module for b in trainable], names, model.model.norm, head, settings.distribution
    )
    apart = Suffix(
        [copy.deepcopy(b.module) for b in trainable],
        names,
        model.model.norm,
        head,
        settings.distribution,
    )
    suffixes = {"shared": shared, APART: apart}
    replicas = {
        key: Replica(suffix.table, origin, distribution=settings.distribution)
        for key, suffix in suffixes.items()
    }
    seconds = Seconds()
    clients: dict[str, Client] = {}
    pools: dict[str, Pool] = {}
    for n, (name, examples) in enumerate(zip(settings.clients, parts, strict=True)):
        prefixes = []
        for batch in data.balanced_batches(examples, settings.pool, settings.batch_size):
            prefixes.append(prefix_of(model, door, batch))
            on_batch()
        key = name if name == APART else "shared"
        pools[name] = Pool(
            suffixes[key],
            prefixes,
            list(chosen.mask[n]),
            settings.local_steps,
            settings.seed * 1000 + n,
            seconds,
        )
        clients[name] = Client(name, replicas[key], pools[name].objective)
    held_out = HeldOut(model, door, evaluation, on_batch)
    return Federation(
        clients=clients,
        pools=pools,
        server=_server(settings, replicas["shared"], chosen),
        plan=chosen,
        suffixes=suffixes,
        replicas=replicas,
        held_out=held_out,
        seconds=seconds,
        cached_bytes=sum(pool.nbytes for pool in pools.values()),
    )


def _server(settings: DemoSettings, replica: Replica, chosen: BlockPlan) -> Server:
    folder = RunFolder(settings.out)
    folder.clear()  # every demo starts at the base model
    return Server(
        FederationSettings(
            job="demo",
            seed=settings.seed,
            lr=lambda round_number: settings.lr * (1 - (round_number - 1) / settings.rounds),
            num_perturbations=settings.perturbations,
            local_steps=settings.local_steps,
            eps=settings.eps,
            distribution=settings.distribution,
            clip=settings.clip,
            weighting="uniform",
        ),
        replica.identity,
        list(chosen.clients),
        torch.as_tensor(chosen.mask.copy()),
        folder.log,
    )
