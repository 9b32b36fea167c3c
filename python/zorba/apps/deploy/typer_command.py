"""``zorba federate`` for a command line of typer, until that is made of settings as well."""

from __future__ import annotations

import typer
import tyro

from zorba.apps.deploy.command import COMMANDS
from zorba.apps.needs import fail

app = typer.Typer(
    help="Run a federation on several machines, with NVIDIA FLARE over mutual TLS.",
    no_args_is_help=True,
)


def _add(name: str) -> None:
    kind, function = COMMANDS[name]

    @app.command(
        name,
        help=kind.__doc__,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def run(context: typer.Context) -> None:
        settings: object = tyro.cli(kind, args=context.args, prog=f"zorba federate {name}")
        try:
            function(settings)
        except (RuntimeError, ValueError, OSError) as error:
            fail(f"federate {name}", str(error))


for _name in COMMANDS:
    _add(_name)
