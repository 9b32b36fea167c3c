"""Writes a project: certificates, and a file for the server and for each site."""

from __future__ import annotations

import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from zorba.apps.command import plain_console
from zorba.apps.deploy.build import build_settings, load_site_model, make_replica, trained_blocks
from zorba.apps.deploy.command import InitSettings
from zorba.apps.deploy.config import ConfigError, RoundSettings, ServerConfig, SiteConfig
from zorba.apps.deploy.provision import provision
from zorba.apps.deploy.yaml_file import make_model
from zorba.apps.finetune.settings import split_labels, split_words
from zorba.federated import FederationSettings
from zorba.planning import BlockPlan, model_weights_memory, plan_blocks
from zorba.sizes import parse_bytes


def init_project(wanted: InitSettings) -> BlockPlan | None:
    """Writes a project; nothing is left behind where it cannot be.

    The model is loaded to count its blocks and to write down its fingerprint, by which the server
    knows that every site has the same one.

    Returns:
        The plan of who activates which blocks; None where no site has a budget, and all activate
        all.

    Raises:
        ConfigError: settings, names or the address make no sense.
        ValueError: no plan fits the budgets, or the model has no blocks.
        OSError: there is no such model, or the folder cannot be written.
    """
    if wanted.folder.exists() and any(wanted.folder.iterdir()):
        raise ConfigError(f"{wanted.folder} is not empty: give another folder")
    budgets = _budgets(wanted.site)
    rounds = _round_settings(wanted)
    sites = [_site(wanted, rounds, name, n) for n, name in enumerate(budgets)]
    # Fingerprint and blocks are the same on every device, and this machine may have no GPU.
    model, _ = load_site_model(sites[0].model_copy(update={"device": "cpu", "offload": False}))
    replica = make_replica(model, sites[0])
    blocks = trained_blocks(model, wanted.blocks)
    names = tuple(block.name for block in blocks)
    # Weights that wait on the host cost the device nothing: budgets are planned for that.
    plan = None
    entries: dict[str, Any] = {name: {"active": names} for name in budgets}
    if any(budgets.values()):
        plan = plan_blocks(model_weights_memory(model, blocks, idle="offload"), budgets)
        entries = {
            name: {
                "active": plan.active_blocks(name),
                "budget": plan.budgets[n],
                "memory": plan.memory[n],
            }
            for n, name in enumerate(plan.clients)
        }
    server = make_model(
        ServerConfig,
        _shared(wanted, ServerConfig)
        | {
            "identity": asdict(replica.identity),
            "blocks": names,
            "sites": entries,
            "settings": rounds,
        },
    )
    build_settings(server)
    # Everything that can be refused was refused by now, without a file.
    try:
        provision(wanted.folder, wanted.job, wanted.address, list(budgets))
        server.write(wanted.folder / "server")
        for site in sites:
            site.write(wanted.folder / "sites" / site.name)
    except BaseException:
        shutil.rmtree(wanted.folder, ignore_errors=True)  # there was nothing in it
        raise
    return plan


def run_init(wanted: InitSettings) -> None:
    """Runs ``zorba federate init``."""
    plan = init_project(wanted)
    console = plain_console()
    if plan is not None:
        console.print(plan.render())
    names = ", ".join(f"sites/{name}" for name in _budgets(wanted.site))
    console.print(f"wrote server, {names} and authority in {wanted.folder}")
    console.print(f"next: zorba federate start {wanted.folder}, or docs/deployment.md")


def _budgets(sites: tuple[str, ...]) -> dict[str, int]:
    """Returns the bytes of each site, by name, of texts such as "ada=2GiB"; 0 for no budget."""
    if not sites:
        raise ConfigError("there are no sites: give --site ada --site bob, one for each")
    budgets = {}
    for text in sites:
        name, _, size = text.partition("=")
        if name in budgets:
            raise ConfigError(f"two sites are called {name}: give each a name of its own")
        try:
            budgets[name] = parse_bytes(size) if size else 0
        except ValueError as error:
            raise ConfigError(f"budget of site {name}: {error}") from None
    without = [name for name, size in budgets.items() if not size]
    if 0 < len(without) < len(budgets):
        other = next(name for name, size in budgets.items() if size)
        raise ConfigError(f"site {without[0]} has no budget, {other} has: give all or none")
    return budgets


def _round_settings(wanted: InitSettings) -> RoundSettings:
    """Returns the wanted settings, and the core's defaults for the others."""
    core = FederationSettings(job="defaults", seed=0, lr=0.0)
    # By name, so that a new option of the command needs no line here.
    values = _shared(core, RoundSettings) | _shared(wanted, RoundSettings)
    return make_model(RoundSettings, values | {"num_perturbations": wanted.perturbations})


def _site(wanted: InitSettings, rounds: RoundSettings, name: str, number: int) -> SiteConfig:
    return make_model(
        SiteConfig,
        _shared(wanted, SiteConfig)
        | {
            "name": name,
            "model": _absolute(wanted.model),
            "data": _absolute(wanted.data).replace("{site}", name),
            "words": split_words(wanted.words),
            "labels": split_labels(wanted.labels),
            "seed": wanted.seed + number,  # sites with the same rows still take other batches
            "distribution": rounds.distribution,
            "rounding": rounds.rounding,
        },
    )


def _shared(source: Any, kind: type[BaseModel]) -> dict[str, Any]:
    """Returns the values that a dataclass has for fields of a model, by name."""
    return {f.name: getattr(source, f.name) for f in fields(source) if f.name in kind.model_fields}


def _absolute(text: str) -> str:
    """Returns a path as an absolute one; a hub's name stays as it is."""
    path = Path(text)
    # The engine's processes run in folders of their own: no relative path may reach them.
    of_sites = "{site}" in text and Path(text.replace("{site}", "")).parent.is_dir()
    return str(path.resolve()) if path.exists() or of_sites else text
