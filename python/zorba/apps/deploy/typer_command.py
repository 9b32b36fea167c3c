"""``zorba federate``: a federation of several machines, or of processes on one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from zorba.apps.finetune.settings import split_labels, split_words
from zorba.apps.needs import check_needs, fail

app = typer.Typer(
    help="Run a federation on several machines, with NVIDIA FLARE over mutual TLS.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
_NEEDS = ["greenlet", "nvflare", "rich", "safetensors", "scipy", "transformers"]

_Folder = Annotated[Path, typer.Argument(help="Project, or the folder of the server or a site.")]
_Only = Annotated[
    list[str] | None, typer.Option("--only", help="server or a site; may be given again.")
]


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder for the project; new or empty.")],
    site: Annotated[
        list[str],
        typer.Option(help="A site, with the memory that its weights may use: ada=2GiB. One each."),
    ],
    model: Annotated[str, typer.Option(help="Local folder or hub name of the model.")],
    data: Annotated[
        str,
        typer.Option(help="JSONL, CSV or TSV file of a site; {site} stands for its name."),
    ],
    template: Annotated[
        str, typer.Option(help='Prompt over the fields of a row: "{sentence} It was".')
    ] = "{text}",
    words: Annotated[
        str,
        typer.Option(help='Label words with the space in front, by commas: " terrible, great".'),
    ] = "",
    label: Annotated[str, typer.Option(help="Field of the label.")] = "label",
    labels: Annotated[
        str, typer.Option(help="Its values in the order of the words, by commas.")
    ] = "",
    blocks: Annotated[str, typer.Option(help="Blocks to train: all, or last:N.")] = "all",
    address: Annotated[
        str, typer.Option(help="Host and port that sites reach the server at.")
    ] = "localhost:8002",
    job: Annotated[str, typer.Option(help="Name of the job.")] = "federation",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 100,
    lr: Annotated[float, typer.Option(help="Learning rate; falls linearly to 0.")] = 1e-2,
    eps: Annotated[float, typer.Option(help="Distance at which losses are taken.")] = 1e-3,
    perturbations: Annotated[
        int, typer.Option(min=1, help="P: finite differences a site measures in a step.")
    ] = 5,
    local_steps: Annotated[int, typer.Option(min=1, help="K: local steps in a round.")] = 1,
    clip: Annotated[float | None, typer.Option(help="Largest absolute value of a scalar.")] = None,
    distribution: Annotated[str, typer.Option(help="rademacher or gaussian noise.")] = "rademacher",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a batch.")] = 16,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a row at most.")] = 256,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    offload: Annotated[
        bool, typer.Option(help="Keep blocks that a site does not activate off its device.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(help="Seconds that a round waits for an answer.")
    ] = 600.0,
    seed: Annotated[int, typer.Option(min=0, help="Of noise and batches.")] = 0,
) -> None:
    """Write a project: certificates, and a file each for the server and the sites.

    The folder sites/NAME goes to the machine of that site, server to the server's; authority
    holds the key that signs certificates and stays where it is. Edit model and data in a site's
    site.yaml, rounds and learning rate in server.yaml.
    """
    _check("init")
    from rich.console import Console

    from zorba.apps.deploy.config import SiteConfig
    from zorba.apps.deploy.project import ProjectSettings, init_project, parse_site

    try:
        shared = SiteConfig(
            name="",
            model=_here(model),
            data=_here(data),
            template=template,
            words=split_words(words),
            label=label,
            labels=split_labels(labels),
            blocks=blocks,
            dtype=dtype,
            offload=offload,
            batch_size=batch_size,
            max_length=max_length,
            seed=seed,
            distribution=distribution,
        )
        settings: dict[str, Any] = {
            "lr": lr,
            "eps": eps,
            "num_perturbations": perturbations,
            "local_steps": local_steps,
            "clip": clip,
        }
        plan = init_project(
            ProjectSettings(
                folder=folder,
                job=job,
                budgets=dict(map(parse_site, site)),
                address=address,
                site=shared,
                rounds=rounds,
                seed=seed,
                settings=settings,
                timeout=timeout,
            )
        )
    except (RuntimeError, ValueError, OSError) as error:
        _fail("init", str(error))
    console = Console()
    if plan is not None:
        console.print(plan.render(), highlight=False)
    names = ", ".join(f"sites/{name.partition('=')[0]}" for name in site)
    console.print(f"wrote server, {names} and authority in {folder}", highlight=False)
    console.print(f"next: zorba federate start {folder}, or docs/deployment.md", highlight=False)


@app.command()
def start(
    folder: _Folder,
    only: _Only = None,
    detach: Annotated[bool, typer.Option(help="Return at once; see status and stop.")] = False,
) -> None:
    """Start what of a project is on this machine, and show the run to its end.

    Ctrl-C ends the watching, not the run. What was killed or stopped before goes on where its log
    and its checkpoints end. When the rounds are done the server stops, and so do the sites that
    this command started.
    """
    _check("start")
    from rich.console import Console

    from zorba.apps.deploy import control
    from zorba.apps.deploy.config import ConfigError

    console = Console()
    try:
        chosen = control.parties(folder, only or ())
        control.start(chosen, console)
        server = next((party for party in chosen if party.is_server), None)
        if detach or server is None:
            return
        try:
            content = control.follow(server, console)
        except KeyboardInterrupt:
            console.print("no longer watching; the run goes on: zorba federate stop ends it")
            return
        control.stop([party for party in chosen if not party.is_server], console)
        if content is None:
            _fail("start", f"the rounds are not done; {server.log} tells why")
        control.print_summary(content, console)
    except (ConfigError, RuntimeError, OSError) as error:
        _fail("start", str(error))


@app.command()
def status(folder: _Folder, only: _Only = None) -> None:
    """Show what of a project runs on this machine; zorba watch FOLDER/server/run shows the run."""
    _check("status")
    from rich.console import Console

    from zorba.apps.deploy import control
    from zorba.apps.deploy.config import ConfigError

    try:
        control.show(control.parties(folder, only or ()), Console())
    except (ConfigError, RuntimeError, OSError) as error:
        _fail("status", str(error))


@app.command()
def stop(folder: _Folder, only: _Only = None) -> None:
    """Stop what of a project runs on this machine; start goes on where it stopped."""
    _check("stop")
    from rich.console import Console

    from zorba.apps.deploy import control
    from zorba.apps.deploy.config import ConfigError

    try:
        control.stop(control.parties(folder, only or ()), Console())
    except (ConfigError, RuntimeError, OSError) as error:
        _fail("stop", str(error))


@app.command()
def demo(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Of data split, batches and noise.")] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate; falls linearly to 0.")] = 1.6e-2,
    address: Annotated[str, typer.Option(help="Host and port of the server.")] = "localhost:8002",
    out: Annotated[Path, typer.Option(help="Folder of the project.")] = Path("runs/federate-demo"),
    cache: Annotated[Path, typer.Option(help="Folder for model and data.")] = Path(".cache"),
) -> None:
    """Fine-tune SmolLM2-135M on film reviews with a server and 3 sites as processes, over TLS."""
    _check("demo", ("accelerate", "gguf", "pyarrow"), "demo,nvflare")
    from zorba.apps.deploy.demo import FederateDemoSettings, run_federate_demo

    try:
        run_federate_demo(FederateDemoSettings(rounds, seed, lr, address, out, cache))
    except (RuntimeError, ValueError, OSError) as error:
        _fail("demo", str(error))


def _here(text: str) -> str:
    """Returns a path that exists, or may for a site, as an absolute one; a hub's name as it is."""
    path = Path(text)
    if path.exists() or (Path(text.replace("{site}", "")).parent.is_dir() and "{site}" in text):
        return str(path.resolve())
    return text


def _check(command: str, further: Sequence[str] = (), extras: str = "nvflare") -> None:
    check_needs(f"federate {command}", (*_NEEDS, *further), extras)


def _fail(command: str, message: str) -> NoReturn:
    fail(f"federate {command}", message)
