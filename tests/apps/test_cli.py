"""The command line: every option and its default, exit codes, and that help does not wait."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from torch import nn
from tyro.conf import Positional, Suppress, UseAppendAction
from zorba import ZerothOrderSGD, ZOArguments, defaults
from zorba.apps.cli import COMMANDS, FEDERATE, parse
from zorba.apps.command import Command
from zorba.apps.plan.settings import PlanSettings
from zorba.apps.reviews.settings import ReviewSettings
from zorba.federated import FederationSettings
from zorba.planning import IdlePolicy

import zorba_kernels as zk
from tests.command import zorba

ROOT = Path(__file__).parents[2]
EVERY = COMMANDS | {f"federate {name}": command for name, command in FEDERATE.items()}
SETTINGS = {name: command.settings for name, command in EVERY.items()}


@pytest.mark.parametrize("command", SETTINGS)
def test_help_shows_each_field_with_its_default_and_choices(command: str) -> None:
    module, _, function = EVERY[command].function.partition(":")
    assert callable(getattr(importlib.import_module(f"zorba.apps.{module}"), function))
    result = zorba(*command.split(), "--help")
    assert result.exit_code == 0
    hints = get_type_hints(SETTINGS[command], include_extras=True)
    for field in dataclasses.fields(SETTINGS[command]):
        hint, flag = hints[field.name], "--" + field.name.replace("_", "-")
        marks = getattr(hint, "__metadata__", ())
        if get_args(Suppress[int])[1] in marks:
            assert flag not in result.text
        elif get_args(Positional[int])[1] in marks:
            assert re.search(rf" {field.name.upper()} [^()]+\(required\)", result.text)
        elif get_args(UseAppendAction[int])[1] in marks:
            assert re.search(rf"{flag} STR [^()]+\(repeatable\)", result.text)
        elif field.default is dataclasses.MISSING:
            assert re.search(rf"{flag} [A-Z=,]+ [^()]+\(required\)", result.text)
        else:
            # Help stands between the flag and the default: no knob without a word on it.
            found = re.search(rf"{flag}(?:, --no-\S+)? (.+?) \(default: (.+?)\) ", result.text)
            assert found, flag
            assert len(found[1].split()) > 1, flag
            value = field.default
            shown = ",".join(value) if isinstance(value, tuple) else str(value)
            assert found[2] == shlex.quote(shown)
            if choices := [c for c in get_args(hint) if isinstance(c, str)]:
                assert found[1].startswith("{" + ",".join(choices) + "}")


def test_help_loads_neither_torch_nor_transformers() -> None:
    assert zorba().output == zorba("--help").output
    script = """
import contextlib, io, json, sys
from zorba.apps.cli import COMMANDS, FEDERATE, main
names = [[], *([name] for name in COMMANDS), ["federate"], *(["federate", n] for n in FEDERATE)]
for name in names:
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        main([*name, "--help"])
    assert " ".join(["usage: zorba", *name]) in output.getvalue(), name
slow = {"torch", "transformers", "numpy", "scipy", "matplotlib", "nvflare"} & set(sys.modules)
assert not slow, slow
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_commands_in_the_documentation_make_sense() -> None:
    found = 0
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text().replace("\\\n", " ")
        for block in re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            for line in re.findall(r"^zorba .*", block, re.MULTILINE):
                parse(shlex.split(line, comments=True)[1:])
                found += 1
    assert found >= 10


def test_defaults_are_the_same_everywhere() -> None:
    expected = {
        "distribution": defaults.DISTRIBUTION,
        "eps": defaults.EPS,
        "perturbations": defaults.NUM_PERTURBATIONS,
        "estimator": defaults.ESTIMATOR,
    }
    compared = set()
    for kind in {*SETTINGS.values(), ZOArguments, FederationSettings, ZerothOrderSGD}:
        if kind is ReviewSettings:  # tuned for one task
            continue
        for name, parameter in inspect.signature(kind).parameters.items():
            knob = name.removeprefix("zo_").removeprefix("num_")
            if knob in expected:
                default = parameter.default
                if (knob, default) == ("distribution", None):
                    # The optimizer's, which depends on the placement; here the default one.
                    (options,) = ZerothOrderSGD(nn.Linear(1, 1), 1.0).param_groups
                    default = options["distribution"]
                assert default == expected[knob], f"{kind.__name__}.{name}"
                compared.add((kind.__name__, knob))
    assert len(compared) >= 4 + 4 + 3 + 2 + 2


def test_choices_are_those_of_the_code_that_takes_them() -> None:
    assert get_args(defaults.Distribution) == zk.noise.DISTRIBUTIONS
    assert set(get_args(get_type_hints(PlanSettings)["idle"])) == set(get_args(IdlePolicy))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "nothing"),
        (["federate"], "Expected one of {init, start, status, stop, demo}"),
        (["finetune", "model"], "--data"),
        (["finetune", "model", "--data", "x", "--steps", "many"], "--steps"),
        (["finetune", "model", "--data", "x", "--leraning-rate", "1"], "--leraning-rate"),
        (["plan", "model", "--budgets", "lots"], "'lots' is no number of bytes"),
    ],
)
def test_arguments_that_make_no_sense_exit_with_2(arguments: list[str], words: str) -> None:
    result = zorba(*arguments)
    assert result.exit_code == 2
    assert words in result.text


def test_a_failure_is_one_sentence_with_text_from_outside_as_it_is(tmp_path: Path) -> None:
    result = zorba("watch", tmp_path / "[red]run")
    assert result.exit_code == 1
    assert result.output.startswith(f"zorba watch: there is no run at {tmp_path}/[red]run: ")
    assert result.output.count("\n") == 1


def test_a_missing_package_is_named_with_its_extra(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        Command(int, "replay:none", "demo,hf", ("json", "no_such_package")).run("replay", None)
    words = "it needs no_such_package: run pip install '.[demo,hf]' in a clone of zorba-kernels"
    assert capsys.readouterr().err == f"zorba replay: {words}\n"
