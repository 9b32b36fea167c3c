"""Makes the server and a site's client of what their files say."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from zorba.apps.deploy.config import ConfigError, ServerConfig, SiteConfig
from zorba.apps.finetune.data import Row
from zorba.apps.finetune.settings import FinetuneSettings
from zorba.apps.finetune.task import device_of, load_model, make_objective, read_data
from zorba.federated import (
    Client,
    FederationSettings,
    ModelIdentity,
    ModelObjective,
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
    """Returns the job's settings.

    Raises:
        ConfigError: one makes no sense.
    """
    values = dict(config.settings)
    lr, rounds = values.pop("lr", None), config.rounds
    if not isinstance(lr, int | float) or isinstance(lr, bool):
        raise ConfigError(f"settings.lr is {lr!r}; expected a number")
    rate = float(lr)

    def falling(round_number: int) -> float:
        return rate * max(0.0, 1.0 - (round_number - 1) / rounds)

    schedule: float | Callable[[int], float] = falling if config.lr_decay == "linear" else rate
    try:
        return FederationSettings(job=config.job, seed=config.seed, lr=schedule, **values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"settings: {error}") from None


def build_server(config: ServerConfig, folder: RunFolder) -> Server:
    """Returns the server, on the log that is in its folder.

    Raises:
        ConfigError: a setting makes no sense.
        LogError: the log is of another job or model, damaged, or open in another server.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    masks = np.array(
        [[block in entry.active for block in config.blocks] for entry in config.sites.values()]
    )
    return Server(
        build_settings(config),
        ModelIdentity(**config.identity),
        list(config.sites),
        masks,
        folder.log,
    )


def trained_blocks(model: nn.Module, blocks: str) -> list[Block]:
    """Returns the blocks that are trained, in order; what is outside of blocks stays frozen.

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
        config.distribution,  # type: ignore[arg-type]
        config.rounding,  # type: ignore[arg-type]
    )


def finetune_settings(config: SiteConfig, folder: Path) -> FinetuneSettings:
    """Returns what a site shares with ``zorba finetune``: model, data, prompt and words."""
    return FinetuneSettings(
        model=config.model,
        data=folder / config.data,
        template=config.template,
        words=config.words,
        label=config.label,
        labels=config.labels,
        blocks=config.blocks,
        offload=folder / "run" / "offload" if config.offload else None,
        dtype=config.dtype,
        device=config.device,
        max_length=config.max_length,
    )


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
    settings = finetune_settings(config, folder)
    rows, _, _ = read_data(settings)
    model, tokenizer = load_model(settings)
    replica = make_replica(model, config)
    run = folder / "run"
    run.mkdir(exist_ok=True)
    if settings.offload is not None:
        Offload(model, [], device_of(settings), settings.offload)  # plans tell what is active
    objective = make_objective(settings, model, tokenizer)
    label = config.label if config.words and config.balanced else None
    batches = Batches(rows, config.batch_size, config.seed, objective.encode, label)
    checkpoint = run / "replica.safetensors"
    if checkpoint.exists():
        try:
            replica.load(checkpoint)
        except ReplicaError as error:
            raise ReplicaError(f"{error}; to start from the model, remove the file") from None
        _log.warning("continuing after round %d", replica.applied_round)
    privacy = config.privacy
    each = privacy is not None and privacy.unit == "example"
    return Client(
        config.name,
        replica,
        ModelObjective(
            model,
            replica.table,
            batches,
            objective.losses if each else objective.loss,
            replica.distribution,
            per_example=each,
        ),
        checkpoint,
        config.checkpoint_every,
        None if privacy is None else PrivacyAccountant(privacy, run / "privacy.json"),
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
        values = {None} if label is None else {row[label] for row in rows}
        self._groups = [
            [i for i, row in enumerate(rows) if label is None or row[label] == value]
            for value in sorted(values, key=str)
        ]
        self._sizes = [len(part) for part in np.array_split(np.arange(size), len(self._groups))]

    def __call__(self, round_number: int, step: int) -> tuple[Any, int]:
        """Returns the batch, and how many rows it has."""
        order = np.random.default_rng([self._seed, round_number, step])
        chosen = [
            self._rows[i]
            for group, size in zip(self._groups, self._sizes, strict=True)
            for i in order.choice(group, min(size, len(group)), replace=False)
        ]
        return self._encode(chosen), len(chosen)
