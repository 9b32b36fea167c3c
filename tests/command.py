"""Runs the ``zorba`` command in this process, and keeps what it says and how it ends."""

from __future__ import annotations

import io
import os
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest import mock

from zorba.apps.cli import main


@dataclass(frozen=True)
class Result:
    exit_code: int
    output: str  # standard output and standard error, as they came

    @property
    def text(self) -> str:
        """The output without line breaks and frames."""
        return re.sub(r"[│╭╮╰╯─\s]+", " ", self.output)


def zorba(*arguments: object, **environment: str) -> Result:
    output, code = io.StringIO(), 0
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "200", **environment}),
        redirect_stdout(output),
        redirect_stderr(output),
    ):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
    return Result(code, output.getvalue())
