"""The ``zorba`` command."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from zorba.demo.settings import DemoSettings
from zorba_kernels.noise import DISTRIBUTIONS

_DEMO_NEEDS = [
    "accelerate",
    "gguf",
    "matplotlib",
    "pyarrow",
    "rich",
    "safetensors",
    "scipy",
    "transformers",
]

app = typer.Typer(
    help="Fine-tune language models without gradients, alone or as a federation.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def main() -> None:
    """Fine-tune language models without gradients, alone or as a federation."""


@app.command()
def demo(
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds of the federation.")
    ] = DemoSettings.rounds,
    seed: Annotated[
        int, typer.Option(min=0, help="Of data split, batches and noise.")
    ] = DemoSettings.seed,
    trainable: Annotated[
        int, typer.Option(min=1, help="Last blocks that are trained.")
    ] = DemoSettings.trainable,
    perturbations: Annotated[
        int, typer.Option(min=1, help="P: finite differences a client measures in a step.")
    ] = DemoSettings.perturbations,
    local_steps: Annotated[
        int, typer.Option(min=1, help="K: local steps in a round.")
    ] = DemoSettings.local_steps,
    lr: Annotated[
        float, typer.Option(help="Learning rate; falls linearly to 0.")
    ] = DemoSettings.lr,
    eps: Annotated[
        float, typer.Option(help="Distance at which losses are taken.")
    ] = DemoSettings.eps,
    clip: Annotated[
        float, typer.Option(help="Largest absolute value of a scalar.")
    ] = DemoSettings.clip,
    distribution: Annotated[
        str, typer.Option(help="rademacher or gaussian noise.")
    ] = DemoSettings.distribution,
    batch_size: Annotated[
        int, typer.Option(min=2, help="Sentences in a batch; even.")
    ] = DemoSettings.batch_size,
    pool: Annotated[
        int, typer.Option(min=2, help="Sentences that each client trains on.")
    ] = DemoSettings.pool,
    alpha: Annotated[
        float, typer.Option(help="Dirichlet concentration of the split.")
    ] = DemoSettings.alpha,
    out: Annotated[Path, typer.Option(help="Folder for summary and pictures.")] = DemoSettings.out,
    cache: Annotated[Path, typer.Option(help="Folder for model and data.")] = DemoSettings.cache,
) -> None:
    """Fine-tune SmolLM2-135M on film reviews, as a federation of 8 clients in one process.

    Trains on Rotten Tomatoes, split unevenly over the clients, and evaluates on SST-2. Each client
    has its own memory budget and so its own active blocks; only seeds and scalars travel.
    """
    missing = [name for name in _DEMO_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        needs = ", ".join(missing)
        _fail("demo", f"it needs {needs}: pip install 'zorba-kernels[demo]'")
    from zorba.demo.run import run_demo

    if distribution not in DISTRIBUTIONS:
        raise typer.BadParameter(f"expected one of {', '.join(DISTRIBUTIONS)}, got {distribution}")
    settings = DemoSettings(
        rounds=rounds,
        seed=seed,
        trainable=trainable,
        perturbations=perturbations,
        local_steps=local_steps,
        lr=lr,
        eps=eps,
        clip=clip,
        distribution="gaussian" if distribution == "gaussian" else "rademacher",
        batch_size=batch_size,
        pool=pool,
        alpha=alpha,
        out=out,
        cache=cache,
    )
    try:
        run_demo(settings)
    except (RuntimeError, ValueError) as error:
        _fail("demo", str(error))


@app.command()
def replay(
    base: Annotated[str, typer.Argument(help="Folder or hub name of the model it started from.")],
    log: Annotated[Path, typer.Argument(help="The trajectory, a .zot file.")],
    out: Annotated[Path, typer.Argument(help="Folder for the fine-tuned model; new or empty.")],
    verify: Annotated[
        bool, typer.Option(help="Compare the result's fingerprint with that of the run.")
    ] = True,
) -> None:
    """Rebuild a fine-tuned model from its base and its trajectory, bit for bit."""
    if importlib.util.find_spec("transformers") is None:
        _fail("replay", "it needs transformers: pip install 'zorba-kernels[hf]'")
    from zorba.trajectory.rebuild import rebuild

    try:
        rebuild(base, log, out, verify=verify, say=typer.echo, progress=_progress_bar("replay"))
    except (RuntimeError, ValueError, OSError) as error:
        _fail("replay", str(error))


def _progress_bar(label: str) -> Callable[[int, int], None] | None:
    """Returns what shows a bar, given done and total; None where nobody looks at a terminal."""
    if not sys.stderr.isatty():
        return None
    bars: list[Any] = []

    def show(done: int, total: int) -> None:
        if not bars:
            bars.append(typer.progressbar(length=total, label=label, file=sys.stderr))
        bars[0].update(done - bars[0].pos)
        if done == total:
            bars[0].render_finish()

    return show


def _fail(command: str, message: str) -> NoReturn:
    typer.secho(f"zorba {command}: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
