"""Makes the server, and a site's client, out of their settings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
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


def build_settings(config: ServerConfig) -> FederationSettings:
    """Returns the job's settings; ConfigError where the core refuses one."""
    # Names of the file are names of the core: a setting that both have needs no line here.
    values = config.settings.model_dump()
    if config.lr_decay == "linear":
        values["lr"] = partial(_falling, rate=values["lr"], rounds=config.rounds)
    try:
        return FederationSettings(job=config.job, seed=config.seed, **values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"settings: {error}") from None


# A plain function of the round: a server that is started again has the same rates.
def _falling(round_number: int, rate: float, rounds: int) -> float:
    return rate * max(0.0, 1.0 - (round_number - 1) / rounds)


def build_server(config: ServerConfig, folder: RunFolder) -> Server:
    """Returns the server, on the log that is in its folder.

    Raises:
        ConfigError: a setting makes no sense.
        LogError: the log is of another job or model, damaged, or open in another server.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    # Rows in the order of the names, columns in that of the blocks: the log counts on both.
    masks = [[block in entry.active for block in config.blocks] for entry in config.sites.values()]
    return Server(
        build_settings(config),
        ModelIdentity(**config.identity.model_dump()),
        list(config.sites),
        np.array(masks),
        folder.log,
    )


def trained_blocks(model: nn.Module, blocks: str) -> list[Block]:
    """Returns the blocks that are trained, in order; parameters outside of them stay frozen.

    Args:
        model: with transformer blocks.
        blocks: "all", or "last:N".
    """
    wanted = active_parameters(model, blocks)
    return [b for b in find_blocks(model) if any(name in wanted for name in b.parameters)]


def make_replica(model: nn.Module, config: SiteConfig) -> Replica:
    """Returns the replica of a model at theta_0."""
    wanted = active_parameters(model, config.blocks)
    groups = {
        name: b
        for b, block in enumerate(trained_blocks(model, config.blocks))
        for name in block.parameters
        if name in wanted
    }
    return Replica(
        DeviceTables({name: wanted[name] for name in groups}, groups),
        model_fingerprint(model.named_parameters()),
        config.distribution,
        config.rounding,
    )


def load_site_model(config: SiteConfig) -> tuple[Any, Any]:
    """Returns the model that a site's file names, and its tokenizer; see ``load_model``."""
    return load_model(_task(config, Path()))


def build_client(folder: Path) -> Client:
    """Loads a site's model and data, and continues from its checkpoint where there is one.

    Args:
        folder: of the site, with ``site.yaml``.

    Raises:
        ConfigError: the file makes no sense.
        ValueError: data, template and words do not fit; the message says where.
        OSError: model or data are not there.
        ReplicaError: the checkpoint is of another model or other noise.
        FederationError: the account of what its scalars have told is damaged or of another unit.
        ImportError: the site is to be private, and the package that counts is not there.
    """
    config = SiteConfig.read(folder)
    if config.threads:
        torch.set_num_threads(config.threads)
    task = _task(config, folder)
    # Data first: a mistake in it is told in a moment, while a model may load for minutes.
    rows, _, _ = read_data(task)
    model, tokenizer = load_model(task)
    replica = make_replica(model, config)
    run = folder / "run"
    run.mkdir(exist_ok=True)
    if config.offload:
        # Nothing is active yet: each plan says which blocks move to the device.
        device = device_of(replace(task, device=config.device))
        Offload(model, [], device, run / "offload")
    objective = make_objective(task, model, tokenizer)
    label = config.label if config.words and config.balanced else None
    batches = Batches(rows, config.batch_size, config.seed, objective.encode, label)
    # In the site's own folder: the engine's state of a client does not survive a restart.
    checkpoint = run / "replica.safetensors"
    if checkpoint.exists():
        try:
            replica.load(checkpoint)
        except ReplicaError as error:
            raise ReplicaError(f"{error}; to start from the model, remove the file") from None
        _log.warning("continuing after round %d", replica.applied_round)
    privacy = None if config.privacy is None else Privacy(**config.privacy.model_dump())
    # Only the unit example needs the losses of the rows apart from each other.
    each = privacy is not None and privacy.unit == "example"
    measured = ModelObjective(
        model,
        replica.table,
        batches,
        objective.losses if each else objective,
        replica.distribution,
        per_example=each,
    )
    # One account for each folder, whatever the job: scalars that were told stay told.
    accountant = PrivacyAccountant(privacy, run / "privacy.json") if privacy else None
    return Client(config.name, replica, measured, checkpoint, config.checkpoint_every, accountant)


def _task(config: SiteConfig, folder: Path) -> FinetuneSettings:
    """Returns what a site shares with ``zorba finetune``: model, data, prompt and words."""
    return FinetuneSettings(
        model=config.model,
        data=folder / config.data,
        template=config.template,
        words=config.words,
        label=config.label,
        labels=config.labels,
        dtype=config.dtype,
        # An offloaded model is loaded on the host; its blocks move from there.
        device="cpu" if config.offload else config.device,
        max_length=config.max_length,
    )


class Batches:
    """Picks a batch by round and step: a repeated plan gets the same rows.

    Args:
        rows: to pick from.
        size: of a batch.
        seed: of the choice.
        encode: makes a batch of rows.
        label: field by whose values a batch is balanced; None for rows as they come.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        size: int,
        seed: int,
        encode: Callable[[Sequence[Row]], Any],
        label: str | None = None,
    ) -> None:
        self._rows = rows
        self._seed = seed
        self._encode = encode
        groups: dict[Any, list[int]] = {}
        for n, row in enumerate(rows):
            groups.setdefault(None if label is None else row[label], []).append(n)
        self._groups = [groups[value] for value in sorted(groups, key=str)]
        self._sizes = [len(part) for part in np.array_split(np.arange(size), len(groups))]

    def __call__(self, round_number: int, step: int) -> tuple[Any, int]:
        """Returns the batch, and how many rows it has."""
        # A generator of its own for each step: no batch depends on those before it.
        order = np.random.default_rng([self._seed, round_number, step])
        chosen = [
            self._rows[n]
            for group, size in zip(self._groups, self._sizes, strict=True)
            for n in order.choice(group, min(size, len(group)), replace=False)
        ]
        return self._encode(chosen), len(chosen)
