"""Writes a project: certificates, and a file for the server and for each site."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zorba.apps.command import plain_console
from zorba.apps.deploy.build import build_settings, finetune_settings, make_replica, trained_blocks
from zorba.apps.deploy.command import InitSettings
from zorba.apps.deploy.config import ConfigError, RoundSettings, ServerConfig, SiteConfig
from zorba.apps.deploy.provision import provision
from zorba.apps.finetune.task import load_model
from zorba.federated import FederationSettings
from zorba.planning import BlockPlan, model_weights_memory, plan_blocks
from zorba.sizes import parse_bytes


def init_project(wanted: InitSettings) -> BlockPlan | None:
    """Writes a project, or nothing where it raises ConfigError, ValueError or OSError.

    Returns the plan of who activates which blocks; None without budgets: all activate all then.
    """
    refuse_used(wanted.folder)
    budgets = _budgets(wanted.site)
    values = asdict(wanted) | {"num_perturbations": wanted.perturbations}
    values = asdict(FederationSettings(job="defaults", seed=0, lr=0.0)) | values
    values["model"] = _absolute(wanted.model)
    rounds = _make(RoundSettings, values)
    sites: list[SiteConfig] = []
    for seed, name in enumerate(budgets, wanted.seed):  # of the same rows they take other batches
        data = _absolute(wanted.data).replace("{site}", name)
        sites.append(_make(SiteConfig, values | {"name": name, "data": data, "seed": seed}))
    # The model is loaded to count its blocks and to write down its fingerprint, by which the server
    # knows that every site has the same one. This machine may have no GPU.
    local = sites[0].model_copy(update={"device": "cpu", "offload": False})
    model, _ = load_model(finetune_settings(local, Path()))
    blocks = trained_blocks(model, wanted.blocks)
    names = tuple(block.name for block in blocks)
    active, plan = dict.fromkeys(budgets, names), None
    if any(budgets.values()):
        # Weights that wait on the host cost the device nothing: budgets are planned for that.
        plan = plan_blocks(model_weights_memory(model, blocks, idle="offload"), budgets)
        active = {name: plan.active_blocks(name) for name in budgets}
    identity = asdict(make_replica(model, local).identity)
    values |= {"identity": identity, "blocks": names, "sites": active, "settings": rounds}
    server = _make(ServerConfig, values)
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
    console = plain_console()
    if (plan := init_project(wanted)) is not None:
        console.print(plan.render())
    names = ", ".join(f"sites/{name}" for name in _budgets(wanted.site))
    console.print(f"wrote server, {names} and authority in {wanted.folder}")
    console.print(f"next: zorba federate start {wanted.folder}, or docs/deployment.md")


def refuse_used(folder: Path) -> None:
    """Raises ConfigError where there is something in a folder: keys and logs cannot be replaced."""
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: give another folder")


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
    ranked = sorted(budgets, key=lambda name: budgets[name] > 0)
    if not budgets[ranked[0]] and budgets[ranked[-1]]:
        raise ConfigError(f"site {ranked[0]} has no budget, {ranked[-1]} has: give all or none")
    return budgets


def _make(kind: type[Any], values: dict[str, Any]) -> Any:
    # Of the values that it has: a new option needs no line here.
    return kind.make({name: value for name, value in values.items() if name in kind.model_fields})


def _absolute(text: str) -> str:
    """Returns a path as an absolute one; a hub's name stays as it is."""
    path = Path(text)
    # The engine's processes run in folders of their own: no relative path may reach them.
    of_sites = "{site}" in text and Path(text.replace("{site}", "")).parent.is_dir()
    return str(path.resolve()) if path.exists() or of_sites else text
