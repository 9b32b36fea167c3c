"""``zorba federate``: a federation of several machines, or of processes on one.

``COMMANDS`` names each subcommand's settings and the function that takes them. The functions raise
RuntimeError, ValueError or OSError with a sentence for people. They import what they need when they
run: ``zorba --help`` must not wait for the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from zorba.apps.finetune.settings import split_labels, split_words
from zorba.apps.needs import check_needs
from zorba.defaults import DISTRIBUTION, EPS, NUM_PERTURBATIONS

_NEEDS = ("greenlet", "nvflare", "pydantic", "rich", "safetensors", "scipy", "transformers")


@dataclass(frozen=True)
class InitSettings:
    """Write a project: certificates, and a file each for the server and the sites.

    The folder sites/NAME goes to the machine of that site, server to the server's; authority
    holds the key that signs certificates and stays where it is. Edit model and data in a site's
    site.yaml, rounds and learning rate in server.yaml.

    Attributes:
        folder: Folder for the project; new or empty.
        site: A site, with the memory that its weights may use: ada=2GiB. One each.
        model: Local folder or hub name of the model.
        data: JSONL, CSV or TSV file of a site; {site} stands for its name.
        template: Prompt over the fields of a row: "{sentence} It was".
        words: Label words with the space in front, by commas: " terrible, great". Empty to learn
            the text of the template.
        label: Field of the label.
        labels: Its values in the order of the words, by commas; empty for the sorted values.
        blocks: Blocks to train: all, or last:N.
        address: Host and port that sites reach the server at.
        job: Name of the job.
        rounds: Rounds.
        lr: Learning rate; falls linearly to 0.
        eps: Distance at which losses are taken.
        perturbations: P: finite differences a site measures in a step.
        local_steps: K: local steps in a round.
        clip: Largest absolute value of a scalar.
        distribution: rademacher or gaussian noise.
        weighting: Sites weigh by their examples, or all alike: uniform.
        batch_size: Rows in a batch.
        max_length: Tokens of a row at most.
        dtype: auto, float32, bfloat16 or float16.
        device: cpu, cuda or cuda:1; a GPU where there is one by default.
        offload: Keep blocks that a site does not activate off its device.
        timeout: Seconds that a round waits for an answer.
        seed: Of noise and batches.
    """

    folder: tyro.conf.Positional[Path]
    site: tyro.conf.UseAppendAction[tuple[str, ...]]
    model: str
    data: str
    template: str = "{text}"
    words: str = ""
    label: str = "label"
    labels: str = ""
    blocks: str = "all"
    address: str = "localhost:8002"
    job: str = "federation"
    rounds: int = 100
    lr: float = 1e-2
    eps: float = EPS
    perturbations: int = NUM_PERTURBATIONS
    local_steps: int = 1
    clip: float | None = None
    distribution: str = DISTRIBUTION
    weighting: str = "examples"
    batch_size: int = 16
    max_length: int = 256
    dtype: str = "auto"
    device: str | None = None
    offload: bool = False
    timeout: float = 600.0
    seed: int = 0


@dataclass(frozen=True)
class StatusSettings:
    """Show the parties of a project that run here; zorba watch FOLDER/server/run shows the run.

    Attributes:
        folder: Project, or the folder of the server or a site.
        only: server or a site; may be given again.
    """

    folder: tyro.conf.Positional[Path]
    only: tyro.conf.UseAppendAction[tuple[str, ...]] = ()


@dataclass(frozen=True)
class StopSettings(StatusSettings):
    """Stop the parties of a project that run here; start goes on where they stopped."""


@dataclass(frozen=True)
class StartSettings(StatusSettings):
    """Start the parties of a project on this machine, and show the run to its end.

    Ctrl-C ends the watching, not the run. A run that was killed or stopped goes on where its log
    and its checkpoints end. When the rounds are done the server stops, and so do the sites that
    this command started.

    Attributes:
        detach: Return at once; see status and stop.
    """

    detach: bool = False


@dataclass(frozen=True)
class FederateDemoSettings:
    """Fine-tune SmolLM2-135M on film reviews with a server and 3 sites as processes, over TLS.

    Attributes:
        rounds: Rounds.
        seed: Of data split, batches and noise.
        lr: Learning rate of the first round; falls linearly to 0.
        address: Host and port of the server.
        out: Folder of the project; an earlier demo there is removed.
        cache: Folder for model and data.
    """

    rounds: int = 40
    seed: int = 1
    lr: float = 1.6e-2
    address: str = "localhost:8002"
    out: Path = Path("runs/federate-demo")
    cache: Path = Path(".cache")


def init(settings: InitSettings) -> None:
    """See ``InitSettings``."""
    check_needs("federate init", _NEEDS, "nvflare")
    from rich.console import Console

    from zorba.apps.deploy.config import SiteConfig
    from zorba.apps.deploy.project import ProjectSettings, init_project, parse_site

    site = SiteConfig(
        name="",
        model=_absolute(settings.model),
        data=_absolute(settings.data),
        template=settings.template,
        words=split_words(settings.words),
        label=settings.label,
        labels=split_labels(settings.labels),
        blocks=settings.blocks,
        dtype=settings.dtype,
        device=settings.device,
        offload=settings.offload,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        seed=settings.seed,
        distribution=settings.distribution,
    )
    project = ProjectSettings(
        folder=settings.folder,
        job=settings.job,
        budgets=dict(map(parse_site, settings.site)),
        address=settings.address,
        site=site,
        rounds=settings.rounds,
        seed=settings.seed,
        settings={
            "lr": settings.lr,
            "eps": settings.eps,
            "num_perturbations": settings.perturbations,
            "local_steps": settings.local_steps,
            "clip": settings.clip,
            "weighting": settings.weighting,
        },
        timeout=settings.timeout,
    )
    plan = init_project(project)
    console = Console()
    if plan is not None:
        console.print(plan.render(), highlight=False)
    names = ", ".join(f"sites/{name}" for name in project.budgets)
    console.print(f"wrote server, {names} and authority in {settings.folder}", highlight=False)
    console.print(
        f"next: zorba federate start {settings.folder}, or docs/deployment.md", highlight=False
    )


def start(settings: StartSettings) -> None:
    """See ``StartSettings``; RuntimeError where the rounds are not done at the end."""
    check_needs("federate start", _NEEDS, "nvflare")
    from rich.console import Console

    from zorba.apps.deploy import control

    console = Console()
    chosen = control.parties(settings.folder, settings.only)
    control.start(chosen, console)
    server = next((party for party in chosen if party.is_server), None)
    if settings.detach or server is None:
        return
    try:
        content = control.follow(server, console)
    except KeyboardInterrupt:
        console.print("no longer watching; the run goes on: zorba federate stop ends it")
        return
    control.stop([party for party in chosen if not party.is_server], console)
    if content is None:
        raise RuntimeError(f"the rounds are not done; {server.log} tells why")
    control.print_summary(content, console)


def status(settings: StatusSettings) -> None:
    """See ``StatusSettings``."""
    check_needs("federate status", _NEEDS, "nvflare")
    from rich.console import Console

    from zorba.apps.deploy import control

    control.show(control.parties(settings.folder, settings.only), Console())


def stop(settings: StopSettings) -> None:
    """See ``StopSettings``."""
    check_needs("federate stop", _NEEDS, "nvflare")
    from rich.console import Console

    from zorba.apps.deploy import control

    control.stop(control.parties(settings.folder, settings.only), Console())


def demo(settings: FederateDemoSettings) -> None:
    """See ``FederateDemoSettings``."""
    check_needs("federate demo", (*_NEEDS, "accelerate", "gguf", "pyarrow"), "demo,nvflare")
    from zorba.apps.deploy.demo import run_federate_demo

    run_federate_demo(settings)


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "init": (InitSettings, init),
    "start": (StartSettings, start),
    "status": (StatusSettings, status),
    "stop": (StopSettings, stop),
    "demo": (FederateDemoSettings, demo),
}
"""Settings and function of each subcommand, by its name."""


def _absolute(text: str) -> str:
    """Returns a path as an absolute one; a hub's name stays as it is."""
    path = Path(text)
    # Processes of the engine run in folders of their own, so no relative path may reach them.
    of_sites = "{site}" in text and Path(text.replace("{site}", "")).parent.is_dir()
    return str(path.resolve()) if path.exists() or of_sites else text
