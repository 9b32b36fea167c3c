"""The ``zorba`` command.

``COMMANDS`` names the settings of each subcommand and the function that takes them. tyro makes the
options of the settings' fields: names, types, choices, defaults, and the comments as help. The
functions import what they need when they run: ``zorba --help`` must not wait for torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import tyro
from tyro.conf import Positional

from zorba.apps.demo.settings import DemoSettings
from zorba.apps.deploy.command import COMMANDS as FEDERATE
from zorba.apps.finetune.settings import FinetuneSettings
from zorba.apps.needs import check_needs, fail
from zorba.apps.plan.settings import PlanSettings

Commands = Mapping[str, tuple[type, Callable[[Any], None]]]


@dataclass(frozen=True)
class ReplaySettings:
    """Rebuild a model from its base and the log of a fine-tune or a federation, bit for bit."""

    # The comment of a field is its help on the command line.
    base: Positional[str]  # Folder or hub name of the model that the run started from.
    log: Positional[Path]  # Trajectory of a fine-tune (a .zot file), or log of a federation.
    out: Positional[Path]  # Folder for the fine-tuned model; new or empty.
    verify: bool = True  # Compare the result's fingerprint with that of the run.


@dataclass(frozen=True)
class WatchSettings:
    """Show a federation while it runs: clients, rounds, loss, bytes, and when each was last seen.

    Ends with the run, or with Ctrl-C, which the run does not notice.
    """

    run: Positional[Path]  # Folder of a run, of any process of this machine.
    once: bool = False  # Show the state of now, and return.


@dataclass(frozen=True)
class ReportSettings:
    """Write a federation's run as one HTML page with its pictures, which needs nothing else."""

    run: Positional[Path]  # Folder of a run, ended or not.
    out: Path | None = None  # Path of the page; report.html in the folder by default.


def demo(settings: DemoSettings) -> None:
    """See ``DemoSettings``."""
    packages = ("accelerate", "gguf", "matplotlib", "pyarrow", "pydantic", "rich", "safetensors")
    check_needs("demo", (*packages, "scipy", "transformers"), "demo")
    from zorba.apps.demo.run import run_demo

    run_demo(settings)


def finetune(settings: FinetuneSettings) -> None:
    """See ``FinetuneSettings``."""
    packages = ["accelerate", "matplotlib", "rich", "safetensors", "transformers"]
    if settings.offload:
        check_needs("finetune", [*packages, "greenlet"], "finetune,offload")
    else:
        check_needs("finetune", packages, "finetune")
    from zorba.apps.finetune.run import run_finetune

    run_finetune(settings)


def replay(settings: ReplaySettings) -> None:
    """See ``ReplaySettings``."""
    check_needs("replay", ["transformers"], "hf")
    from zorba.apps.replay import rebuild

    rebuild(settings.base, settings.log, settings.out, verify=settings.verify)


def plan(settings: PlanSettings) -> None:
    """See ``PlanSettings``."""
    packages = ("greenlet", "matplotlib", "rich", "safetensors", "scipy", "transformers")
    check_needs("plan", packages, "plan")
    from zorba.apps.plan.command import run_plan

    run_plan(settings)


def watch(settings: WatchSettings) -> None:
    """See ``WatchSettings``."""
    check_needs("watch", ["pydantic", "rich"], "watch")
    from zorba.apps.watch.live import watch_run

    watch_run(settings.run, once=settings.once)


def report(settings: ReportSettings) -> None:
    """See ``ReportSettings``."""
    check_needs("report", ["jinja2", "matplotlib", "pydantic", "rich"], "watch")
    from zorba.apps.watch.page import write_report

    print(f"wrote {write_report(settings.run, settings.out)}")


COMMANDS: Commands = {
    "demo": (DemoSettings, demo),
    "finetune": (FinetuneSettings, finetune),
    "replay": (ReplaySettings, replay),
    "plan": (PlanSettings, plan),
    "watch": (WatchSettings, watch),
    "report": (ReportSettings, report),
}
"""Settings and function of each subcommand, by its name; those of ``zorba federate`` follow."""

_FEDERATE_HELP = "Run a federation on several machines, with NVIDIA FLARE over mutual TLS."


def parse(arguments: Sequence[str]) -> Any:
    """Returns the settings of the command that the arguments name.

    Raises:
        SystemExit: 0 after ``--help``, 2 where the arguments make no sense, with what was expected.
    """
    federate = tyro.conf.subcommand("federate", description=_FEDERATE_HELP)
    every: Any = Union[_subcommands(COMMANDS), Annotated[_subcommands(FEDERATE), federate]]  # noqa: UP007
    return tyro.cli(
        every,
        prog="zorba",
        description="Fine-tune language models without gradients, alone or as a federation.",
        args=arguments or ["--help"],
        config=(tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command.

    Args:
        arguments: those of the process by default.

    Raises:
        SystemExit: 1 where the command failed, 2 where its arguments make no sense, 130 after
            Ctrl-C; each with a sentence on stderr.
    """
    settings = parse(sys.argv[1:] if arguments is None else arguments)
    runs = {kind: (name, run) for name, (kind, run) in COMMANDS.items()}
    runs |= {kind: (f"federate {name}", run) for name, (kind, run) in FEDERATE.items()}
    name, run = runs[type(settings)]
    # Expected failures are sentences; other exceptions are defects and keep their traceback.
    try:
        run(settings)
    except (RuntimeError, ValueError, OSError) as error:
        fail(name, str(error))
    except KeyboardInterrupt:
        fail(name, "interrupted; files that were written stay", code=130)


def _subcommands(commands: Commands) -> Any:
    """Returns the type of all settings, which tyro reads as subcommands."""
    kinds = (Annotated[k, tyro.conf.subcommand(name)] for name, (k, _) in commands.items())
    return Union[tuple(kinds)]  # noqa: UP007


if __name__ == "__main__":
    main()
