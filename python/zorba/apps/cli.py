"""The ``zorba`` command.

tyro makes options of the settings' fields: names, types, choices, defaults, comments as help.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import tyro
from tyro.conf import Positional

from zorba.apps.command import Command, fail
from zorba.apps.deploy.command import COMMANDS as FEDERATE
from zorba.apps.finetune.settings import FinetuneSettings
from zorba.apps.plan.settings import PlanSettings
from zorba.apps.reviews.settings import ReviewSettings


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


_HF = ("rich", "safetensors", "transformers")
_MODEL = ("greenlet", "matplotlib", *_HF)
_FINETUNE = ("accelerate", *_MODEL)
_PAGE = ("jinja2", "matplotlib", "pydantic", "rich")
_REVIEWS = ("accelerate", "filelock", "gguf", "pyarrow", "scipy")
COMMANDS = {
    "demo": Command(ReviewSettings, "demo:run_demo", "demo", (*_REVIEWS, *_PAGE, *_HF)),
    "finetune": Command(FinetuneSettings, "finetune.run:run_finetune", "finetune", _FINETUNE),
    "replay": Command(ReplaySettings, "replay:run_replay", "hf", ("transformers",)),
    "plan": Command(PlanSettings, "plan.command:run_plan", "plan", (*_MODEL, "scipy")),
    "watch": Command(WatchSettings, "watch.live:run_watch", "watch", _PAGE),
    "report": Command(ReportSettings, "watch.page:run_report", "watch", _PAGE),
}
"""The subcommands by name; those of ``zorba federate`` follow."""


def parse(arguments: Sequence[str]) -> Any:
    """Returns the settings of a command; arguments that make no sense end with 2 and a sentence."""
    words = "Run a federation on several machines, with NVIDIA FLARE over mutual TLS."
    federate = tyro.conf.subcommand("federate", description=words)
    every: Any = Union[_subcommands(COMMANDS), Annotated[_subcommands(FEDERATE), federate]]  # noqa: UP007
    return tyro.cli(
        every,
        prog="zorba",
        description="Fine-tune language models without gradients, alone or as a federation.",
        args=arguments or ["--help"],
        config=(tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command, of the process's arguments by default.

    Exits with 1 where it failed and 130 after Ctrl-C, with a sentence on stderr.
    """
    settings = parse(sys.argv[1:] if arguments is None else arguments)
    every = COMMANDS | {f"federate {name}": command for name, command in FEDERATE.items()}
    name = next(name for name, command in every.items() if command.settings is type(settings))
    # Expected failures are sentences; other exceptions are defects and keep their traceback.
    try:
        every[name].run(name, settings)
    except (RuntimeError, ValueError, OSError) as error:
        fail(name, str(error))
    except KeyboardInterrupt:
        fail(name, "interrupted; files that were written stay", code=130)


def _subcommands(commands: Mapping[str, Command]) -> Any:
    """Returns the type of all settings, which tyro reads as subcommands."""
    kinds = (Annotated[c.settings, tyro.conf.subcommand(name)] for name, c in commands.items())
    return Union[tuple(kinds)]  # noqa: UP007


if __name__ == "__main__":
    main()
