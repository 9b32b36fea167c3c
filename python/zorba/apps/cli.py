"""The ``zorba`` command.

``COMMANDS`` names the settings of each subcommand and the function that takes them. tyro makes the
options of the settings' fields: names, types, choices, defaults, and the comments as help. The
functions import what they need when they run: ``zorba --help`` must not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """Rebuild a fine-tuned model from its base and its trajectory, bit for bit."""

    # The comment of a field is its help on the command line.
    base: Positional[str]  # Folder or hub name of the model that the run started from.
    log: Positional[Path]  # The trajectory, a .zot file.
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
    packages = ("accelerate", "gguf", "matplotlib", "pyarrow", "rich", "safetensors", "scipy")
    check_needs("demo", (*packages, "transformers"), "demo")
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
    check_needs("watch", ["rich"], "watch")
    from zorba.apps.watch.command import watch_run

    watch_run(settings.run, once=settings.once)


def report(settings: ReportSettings) -> None:
    """See ``ReportSettings``."""
    check_needs("report", ["jinja2", "rich"], "watch")
    from zorba.apps.watch.page import write_report

    print(f"wrote {write_report(settings.run, settings.out)}")


COMMANDS: dict[str, tuple[type, Callable[[Any], None]] | Commands] = {
    "demo": (DemoSettings, demo),
    "finetune": (FinetuneSettings, finetune),
    "replay": (ReplaySettings, replay),
    "plan": (PlanSettings, plan),
    "watch": (WatchSettings, watch),
    "report": (ReportSettings, report),
    "federate": FEDERATE,
}
"""Settings and function of each subcommand, by its name, or the subcommands of a group."""

_GROUPS = {
    "federate": "Run a federation on several machines, with NVIDIA FLARE over mutual TLS.",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command.

    Args:
        arguments: those of the process by default.

    Raises:
        SystemExit: 1 where the command failed, 2 for a command line that makes no sense, 130 after
            Ctrl-C; each with a sentence on stderr.
    """
    settings = tyro.cli(
        _union(COMMANDS),
        prog="zorba",
        description="Fine-tune language models without gradients, alone or as a federation.",
        args=arguments,
        config=(tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName),
    )
    name, run = next((n, f) for n, kind, f in _leaves(COMMANDS) if type(settings) is kind)
    try:
        run(settings)
    except (RuntimeError, ValueError, OSError) as error:
        fail(name, str(error))
    except KeyboardInterrupt:
        fail(name, "interrupted; files that were written stay", code=130)


def _union(commands: Mapping[str, Any]) -> Any:
    """The type of all settings of a group, which tyro reads as its subcommands."""
    return Union[  # noqa: UP007  (of a tuple)
        tuple(
            Annotated[
                _union(entry) if name in _GROUPS else entry[0],
                tyro.conf.subcommand(name, description=_GROUPS.get(name)),
            ]
            for name, entry in commands.items()
        )
    ]


def _leaves(
    commands: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, type, Callable[[Any], None]]]:
    """Yields name, settings and function of every command."""
    for name, entry in commands.items():
        if name in _GROUPS:
            yield from _leaves(entry, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", *entry


if __name__ == "__main__":
    main()
