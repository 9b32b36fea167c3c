"""Writes a project: certificates, and a file for the server and for each site."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from zorba.apps.deploy.build import (
    build_settings,
    finetune_settings,
    make_replica,
    trained_blocks,
)
from zorba.apps.deploy.config import ConfigError, ServerConfig, SiteConfig, SiteEntry
from zorba.apps.deploy.provision import provision
from zorba.apps.finetune.task import load_model
from zorba.federated.codec import check_name
from zorba.federated.errors import MessageError
from zorba.planning import BlockPlan, model_weights_memory, plan_blocks
from zorba.sizes import parse_bytes

_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True)
class ProjectSettings:
    """What ``zorba federate init`` is told.

    Attributes:
        folder: of the project; new or empty.
        job: name of the job.
        budgets: bytes that weights and stream buffers may use on each site's device, by site; 0
            for no limit.
        address: host and port that sites reach the server at.
        site: what all sites have in common; ``{site}`` in its data stands for a site's name.
        rounds: of the run.
        seed: of the job.
        settings: other fields of ``FederationSettings``.
        lr_decay: "linear" or "constant".
        timeout: seconds that a round waits for an answer.
    """

    folder: Path
    job: str
    budgets: Mapping[str, int]
    address: str
    site: SiteConfig
    rounds: int = 100
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    lr_decay: str = "linear"
    timeout: float = 600.0


def init_project(wanted: ProjectSettings) -> BlockPlan | None:
    """Writes a project; nothing is left behind where it cannot be.

    The model is loaded to count its blocks and to write down its fingerprint, by which the server
    knows that every site has the same one.

    Returns:
        The plan of who activates what; None where no site has a budget, and all activate all.

    Raises:
        ConfigError: settings, names or the address make no sense.
        ValueError: no plan fits the budgets, or the model has no blocks.
        OSError: there is no such model, or the folder cannot be written.
    """
    _check(wanted)
    sites = list(wanted.budgets)
    model, _ = load_model(finetune_settings(replace(wanted.site, device="cpu"), wanted.folder))
    replica = make_replica(model, wanted.site)
    blocks = trained_blocks(model, wanted.site.blocks)
    names = tuple(block.name for block in blocks)
    plan = None
    entries = {site: SiteEntry(names) for site in sites}
    if any(wanted.budgets.values()):
        plan = plan_blocks(
            model_weights_memory(model, blocks, idle="offload"), dict(wanted.budgets)
        )
        entries = {
            site: SiteEntry(plan.active_blocks(site), plan.budgets[n], plan.memory[n])
            for n, site in enumerate(plan.clients)
        }
    server = ServerConfig(
        job=wanted.job,
        seed=wanted.seed,
        rounds=wanted.rounds,
        address=wanted.address,
        identity=asdict(replica.identity),
        blocks=names,
        sites=entries,
        settings={
            **wanted.settings,
            "distribution": wanted.site.distribution,
            "rounding": wanted.site.rounding,
        },
        lr_decay=wanted.lr_decay,
        timeout=wanted.timeout,
    )
    build_settings(server)
    try:
        provision(wanted.folder, wanted.job, wanted.address, sites)
        server.write(wanted.folder / "server")
        for number, site in enumerate(sites):
            mine = replace(
                wanted.site,
                name=site,
                data=wanted.site.data.replace("{site}", site),
                seed=wanted.site.seed + number,
            )
            mine.write(wanted.folder / "sites" / site)
    except BaseException:
        shutil.rmtree(wanted.folder, ignore_errors=True)  # there was nothing in it
        raise
    return plan


def parse_site(text: str) -> tuple[str, int]:
    """Returns name and budget of "name" or "name=2GiB"; 0 for no budget.

    Raises:
        ConfigError: the name or the size makes no sense.
    """
    name, _, size = text.partition("=")
    if not _SITE.fullmatch(name) or name == "server":
        raise ConfigError(f"{name!r} is no name of a site: expected letters, digits and ._-")
    if not size:
        return name, 0
    try:
        return name, parse_bytes(size)
    except ValueError as error:
        raise ConfigError(f"budget of site {name}: {error}") from None


def _check(wanted: ProjectSettings) -> None:
    if wanted.folder.exists() and any(wanted.folder.iterdir()):
        raise ConfigError(f"{wanted.folder} is not empty: give another folder")
    if not wanted.budgets:
        raise ConfigError("there are no sites: give --site ada --site bob, one for each")
    with_budget = [site for site, size in wanted.budgets.items() if size]
    if with_budget and len(with_budget) < len(wanted.budgets):
        without = next(site for site, size in wanted.budgets.items() if not size)
        raise ConfigError(f"site {without} has no budget, {with_budget[0]} has: give all or none")
    try:
        check_name(wanted.job, "job")
        for site in wanted.budgets:
            check_name(site, "site")
    except MessageError as error:
        raise ConfigError(str(error)) from None
