"""Makes the server, and a site's client, out of their settings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from zorba.apps.deploy.config import ConfigError, ServerConfig, SiteConfig
from zorba.apps.finetune.settings import FinetuneSettings
from zorba.apps.finetune.task import Row, device_of, load_model, make_objective, read_data
from zorba.federated import (
    Client,
    FederationSettings,
    ModelIdentity,
    ModelObjective,
    Privacy,
    PrivacyAccountant,
    Replica,
    ReplicaError,
    RunFolder,
    Server,
    model_fingerprint,
)
from zorba.hf import Block, find_blocks
from zorba.offload import Offload
from zorba.optim import active_parameters
from zorba.tables import DeviceTables

_log = logging.getLogger(__name__)
_Encode = Callable[[Sequence[Row]], Any]


def build_settings(config: ServerConfig) -> FederationSettings:
    """Returns the job's settings; ConfigError where the core refuses one."""
    # Names of the file are names of the core: a setting that both have needs no line here.
    values = config.settings.model_dump()
    if config.lr_decay == "linear":
        # A plain function of the round: a server that is started again has the same rates.
        first, rounds = config.settings.lr, config.rounds
        values["lr"] = lambda number: first * max(0.0, 1.0 - (number - 1) / rounds)
    try:
        return FederationSettings(job=config.job, seed=config.seed, **values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"settings: {error}") from None


def build_server(config: ServerConfig, folder: RunFolder) -> Server:
    """Returns the server, on the log that is in its folder; raises ConfigError and LogError."""
    folder.path.mkdir(parents=True, exist_ok=True)
    return Server(
        build_settings(config),
        ModelIdentity(**config.identity.model_dump()),
        list(config.sites),
        # Rows in the order of the names, columns in that of the blocks: the log counts on both.
        [[block in active for block in config.blocks] for active in config.sites.values()],
        folder.log,
    )


def trained_blocks(model: nn.Module, blocks: str) -> list[Block]:
    """Returns the blocks that "all" or "last:N" trains; parameters outside of them stay frozen."""
    wanted = active_parameters(model, blocks)
    return [b for b in find_blocks(model) if any(name in wanted for name in b.parameters)]


def make_replica(model: nn.Module, config: SiteConfig) -> Replica:
    """Returns the replica of a model at theta_0."""
    wanted = active_parameters(model, config.blocks)
    blocks = enumerate(trained_blocks(model, config.blocks))
    groups = {name: b for b, block in blocks for name in block.parameters if name in wanted}
    table = DeviceTables({name: wanted[name] for name in groups}, groups)
    fingerprint = model_fingerprint(model.named_parameters())
    return Replica(table, fingerprint, config.distribution, config.rounding)


def finetune_settings(config: SiteConfig, folder: Path) -> FinetuneSettings:
    """Returns what a site in a folder shares with ``zorba finetune``: model, data and prompt."""
    shared = config.model_dump(
        include={"model", "template", "words", "label", "labels", "dtype", "device", "max_length"}
    )
    offload = folder / "run" / "offload" if config.offload else None
    return FinetuneSettings(data=folder / config.data, offload=offload, **shared)


def build_client(folder: Path) -> Client:
    """Loads a site's model and data, and continues from its checkpoint where there is one."""
    config = SiteConfig.read(folder)
    if config.threads:
        torch.set_num_threads(config.threads)
    task = finetune_settings(config, folder)
    # Data first: a mistake in it is told in a moment, while a model may load for minutes.
    rows, _, _ = read_data(task)
    model, tokenizer = load_model(task)
    replica = make_replica(model, config)
    run = folder / "run"
    run.mkdir(exist_ok=True)
    if task.offload is not None:
        # Nothing is active yet: each plan says which blocks move to the device.
        Offload(model, [], device_of(task), task.offload)
    # In the site's own folder: the engine's state of a client does not survive a restart.
    if (checkpoint := run / "replica.safetensors").exists():
        try:
            replica.load(checkpoint)
        except ReplicaError as error:
            raise ReplicaError(f"{error}; to start from the model, remove the file") from None
        _log.warning("continuing after round %d", replica.applied_round)
    objective = make_objective(task, model, tokenizer)
    label = config.label if config.words and config.balanced else None
    accountant, each = None, objective.by_row and replica.distribution == "rank1"
    if config.privacy is not None:
        policy = Privacy(**config.privacy.model_dump())
        # One account for each folder, whatever the job: scalars that were told stay told.
        accountant = PrivacyAccountant(policy, run / "privacy.json")
        # The unit example needs the losses of the rows apart from each other, as directions do
        # that are of some rows of a batch.
        each |= policy.unit == "example"
    measured = ModelObjective(
        model,
        replica.table,
        pick_batches(rows, config.batch_size, config.seed, objective.encode, label),
        objective.losses if each else objective,
        replica.distribution,
        per_example=each,
    )
    every, by_row = config.checkpoint_every, objective.by_row and measured.by_row
    return Client(config.name, replica, measured, checkpoint, every, accountant, by_row)


def pick_batches(
    rows: Sequence[Row], size: int, seed: int, encode: _Encode, label: str | None = None
) -> Callable[[int, int], tuple[Any, int]]:
    """Returns the batch and its size by round and step; balanced by a label where there is one."""
    groups: dict[Any, list[int]] = {}
    for n, row in enumerate(rows):
        groups.setdefault(None if label is None else row[label], []).append(n)
    sizes = [len(part) for part in np.array_split(np.arange(size), len(groups))]

    def pick(round_number: int, step: int) -> tuple[Any, int]:
        # A generator of its own for each step: a repeated plan gets the same rows.
        order = np.random.default_rng([seed, round_number, step])
        drawn = [
            order.choice(groups[value], min(count, len(groups[value])), replace=False)
            for value, count in zip(sorted(groups, key=str), sizes, strict=True)
        ]
        # In turns, so that a part of the batch, which may have a direction of its own, has as many
        # of each label, too.
        chosen = [rows[n] for turn in zip_longest(*drawn) for n in turn if n is not None]
        return encode(chosen), len(chosen)

    return pick
