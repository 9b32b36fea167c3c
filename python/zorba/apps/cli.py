"""The ``zorba`` command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from zorba.apps.demo.settings import DemoSettings
from zorba.apps.deploy.typer_command import app as federate
from zorba.apps.finetune.settings import FinetuneSettings, split_labels, split_words
from zorba.apps.needs import check_needs, fail
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

_PLAN_NEEDS = ["greenlet", "matplotlib", "rich", "safetensors", "scipy", "transformers"]
_FINETUNE_NEEDS = ["matplotlib", "rich", "safetensors", "transformers"]
_FINETUNE = FinetuneSettings("", Path())  # the defaults

app = typer.Typer(
    help="Fine-tune language models without gradients, alone or as a federation.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.add_typer(federate, name="federate")


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
    check_needs("demo", _DEMO_NEEDS, "demo")
    from zorba.apps.demo.run import run_demo

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
        fail("demo", str(error))


@app.command()
def finetune(
    model: Annotated[str, typer.Argument(help="Local folder or hub name of a language model.")],
    data: Annotated[Path, typer.Option(help="JSONL, CSV or TSV file to train on.")],
    eval_data: Annotated[Path | None, typer.Option(help="File to evaluate on.")] = None,
    template: Annotated[
        str, typer.Option(help='Prompt over the fields of a row: "{sentence} It was".')
    ] = _FINETUNE.template,
    words: Annotated[
        str,
        typer.Option(help='Label words with the space in front, by commas: " terrible, great".'),
    ] = "",
    label: Annotated[str, typer.Option(help="Field of the label.")] = _FINETUNE.label,
    labels: Annotated[
        str, typer.Option(help="Its values in the order of the words, by commas.")
    ] = "",
    steps: Annotated[int, typer.Option(min=1, help="Steps.")] = _FINETUNE.steps,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a batch.")] = _FINETUNE.batch_size,
    max_length: Annotated[
        int, typer.Option(min=2, help="Tokens of a row at most.")
    ] = _FINETUNE.max_length,
    lr: Annotated[float, typer.Option(help="Learning rate; falls linearly to 0.")] = _FINETUNE.lr,
    eps: Annotated[float, typer.Option(help="Distance at which losses are taken.")] = _FINETUNE.eps,
    perturbations: Annotated[
        int, typer.Option(min=1, help="P: directions a step.")
    ] = _FINETUNE.perturbations,
    estimator: Annotated[str, typer.Option(help="central or forward.")] = _FINETUNE.estimator,
    distribution: Annotated[
        str, typer.Option(help="rademacher or gaussian noise.")
    ] = _FINETUNE.distribution,
    placement: Annotated[str, typer.Option(help="scratch or inplace.")] = _FINETUNE.placement,
    blocks: Annotated[str, typer.Option(help="all, or last:N blocks.")] = _FINETUNE.blocks,
    offload: Annotated[
        Path | None, typer.Option(help="Folder from which idle blocks are streamed.")
    ] = _FINETUNE.offload,
    momentum: Annotated[float, typer.Option(help="Replayed from seeds.")] = _FINETUNE.momentum,
    weight_decay: Annotated[float, typer.Option(help="Decoupled.")] = _FINETUNE.weight_decay,
    clip: Annotated[
        float | None, typer.Option(help="Largest absolute value of a scalar.")
    ] = _FINETUNE.clip,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16.")
    ] = _FINETUNE.dtype,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:1; a GPU where there is one.")
    ] = _FINETUNE.device,
    seed: Annotated[int, typer.Option(min=0, help="Of batches and noise.")] = _FINETUNE.seed,
    eval_every: Annotated[
        int, typer.Option(min=0, help="Steps between evaluations; 0: start and end.")
    ] = _FINETUNE.eval_every,
    out: Annotated[Path, typer.Option(help="Folder for what is written.")] = _FINETUNE.out,
    save: Annotated[str, typer.Option(help="model, trajectory or both.")] = _FINETUNE.save,
) -> None:
    """Fine-tune a language model without gradients.

    With label words it learns to classify: the word that is likeliest behind the prompt is the
    answer. Without, it learns the text that the template makes of each row. Writes the model, its
    trajectory (see zorba replay) or both, metrics.json and loss.png.
    """
    if offload:
        check_needs("finetune", [*_FINETUNE_NEEDS, "greenlet"], "finetune,offload")
    else:
        check_needs("finetune", _FINETUNE_NEEDS, "finetune")
    from zorba.apps.finetune.run import run_finetune

    try:
        settings = FinetuneSettings(
            model=model,
            data=data,
            eval_data=eval_data,
            template=template,
            words=split_words(words),
            label=label,
            labels=split_labels(labels),
            steps=steps,
            batch_size=batch_size,
            max_length=max_length,
            lr=lr,
            eps=eps,
            perturbations=perturbations,
            estimator=estimator,
            distribution=distribution,
            placement=placement,
            blocks=blocks,
            offload=offload,
            momentum=momentum,
            weight_decay=weight_decay,
            clip=clip,
            dtype=dtype,
            device=device,
            seed=seed,
            eval_every=eval_every,
            out=out,
            save=save,
        )
        run_finetune(settings)
    except (RuntimeError, ValueError, OSError) as error:
        fail("finetune", str(error))


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
    check_needs("replay", ["transformers"], "hf")
    from zorba.log.rebuild import rebuild

    try:
        rebuild(base, log, out, verify=verify, say=typer.echo, progress=_progress_bar("replay"))
    except (RuntimeError, ValueError, OSError) as error:
        fail("replay", str(error))


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a language model.")],
    budgets: Annotated[
        str, typer.Option(help="phone=300MB,laptop=2GiB, or a file with one a line, or JSON.")
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 16,
    length: Annotated[int, typer.Option(min=1, help="Tokens of the longest sequence.")] = 64,
    perturbations: Annotated[int, typer.Option(min=1, help="P: directions a step.")] = 5,
    estimator: Annotated[str, typer.Option(help="central or forward.")] = "central",
    loss: Annotated[str, typer.Option(help="label-words, or text: all logits.")] = "label-words",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; auto for the model's.")
    ] = "auto",
    idle: Annotated[str, typer.Option(help="Idle blocks: offload or resident.")] = "offload",
    priorities: Annotated[str, typer.Option(help="Weight of each block in F1, by commas.")] = "",
    min_coverage: Annotated[int, typer.Option(min=1, help="Clients a block.")] = 1,
    min_active: Annotated[int, typer.Option(min=0, help="Least blocks a client.")] = 1,
    max_active: Annotated[int | None, typer.Option(min=1, help="Most blocks a client.")] = None,
    tolerance: Annotated[
        float, typer.Option(help="How much F1 may rise to save memory; 0.05 is 5 %.")
    ] = 0.0,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run a client for each mask, and measure it.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    calibration: Annotated[
        Path, typer.Option(help="File that keeps what this machine adds.")
    ] = Path(".cache/calibration.json"),
    out: Annotated[Path, typer.Option(help="Folder for plan.json, plan.png.")] = Path("runs/plan"),
) -> None:
    """Plan which client activates which blocks, and predict what each will take.

    Budgets are bytes above what a process takes for its imports. The first plan on a machine
    calibrates: it runs three blocks of the model, which takes a minute.
    """
    check_needs("plan", _PLAN_NEEDS, "plan")
    from zorba.apps.plan.budgets import read_budgets
    from zorba.apps.plan.command import plan_settings, run_plan

    try:
        settings = plan_settings(
            model=model,
            dtype=dtype,
            work={
                "batch_size": batch_size,
                "length": length,
                "num_perturbations": perturbations,
                "estimator": estimator,
                "loss": loss,
                "idle": idle,
            },
            budgets=read_budgets(budgets),
            priorities=tuple(map(float, priorities.split(","))) if priorities else None,
            min_coverage=min_coverage,
            min_active=min_active,
            max_active=max_active,
            tolerance=tolerance,
            measure=measure,
            calibration=calibration,
            out=out,
            device=device,
        )
        run_plan(settings)
    except (RuntimeError, ValueError, OSError) as error:
        fail("plan", str(error))


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="Folder of a run, of any process of this machine.")],
    once: Annotated[bool, typer.Option(help="Show the state of now, and return.")] = False,
) -> None:
    """Show a federation while it runs: clients, rounds, loss, bytes, and when each was last seen.

    Ends with the run, or with Ctrl-C, which the run does not notice.
    """
    check_needs("watch", ["rich"], "watch")
    from zorba.apps.watch.command import watch_run

    try:
        watch_run(run, once=once)
    except (RuntimeError, OSError) as error:
        fail("watch", str(error))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, ended or not.")],
    out: Annotated[
        Path | None, typer.Option(help="Path of the page; report.html in the folder.")
    ] = None,
) -> None:
    """Write a federation's run as one HTML page with its pictures, which needs nothing else."""
    check_needs("report", ["jinja2", "rich"], "watch")
    from zorba.apps.watch.page import write_report

    try:
        typer.echo(f"wrote {write_report(run, out)}")
    except (RuntimeError, OSError) as error:
        fail("report", str(error))


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


if __name__ == "__main__":
    app()
