"""The tests that need a GPU, in one process of pytest without plugins."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu_check.build import ROOT
from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.sizes import Sizes

GPU_TESTS = (
    "tests/kernels/test_cuda_backend.py",
    "tests/kernels/test_illegal_use.py",
    "tests/kernels/test_torch_library.py",
)
REHEARSAL = ("tests/kernels/test_golden.py",)


class Suite(NamedTuple):
    """Outcomes of the tests of one file."""

    outcomes: Counter[str]  # of "passed", "failed", "skipped"
    failed: list[str]
    reasons: Counter[str]  # why tests were skipped


def run(report: Report, device: torch.device, sizes: Sizes) -> None:
    files = list(GPU_TESTS if device.type == "cuda" else REHEARSAL)
    suites, status = run_pytest(files)
    with report.check("pytest ends as it should", files=files):
        assert status == 0, f"pytest ended with {status}"
    for file in files:
        suite = suites.get(file, Suite(Counter(), [], Counter()))
        with report.check(file, tests=dict(suite.outcomes), skipped=dict(suite.reasons)):
            assert not suite.failed, f"failed: {', '.join(suite.failed)}"
            assert suite.outcomes["passed"], "no test of this file ran"


def run_pytest(files: list[str]) -> tuple[dict[str, Suite], int]:
    """Outcomes by file, and pytest's exit status."""
    # Whatever plugins are installed beside: the tests need none.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", *files, f"--junitxml={log}"]
        command += ["-p", "no:cacheprovider", "--durations=5", "--maxfail=25", "-rf"]
        command += ["--continue-on-collection-errors"]  # one broken file must not stop the others
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        suites = read(log, files) if log.is_file() else {}
    return suites, status


def read(log: Path, files: list[str]) -> dict[str, Suite]:
    """Reads JUnit's XML; the class of a test is its file, with dots."""
    suites = {file: Suite(Counter(), [], Counter()) for file in files}
    by_class = {file.removesuffix(".py").replace("/", "."): file for file in files}
    for case in ET.parse(log).getroot().iter("testcase"):
        name = case.get("classname") or case.get("name") or ""  # a file that cannot be collected
        file = next((f for c, f in by_class.items() if f"{name}.".startswith(f"{c}.")), None)
        if file is None:
            continue
        suite = suites[file]
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            suite.outcomes["failed"] += 1
            suite.failed.append(case.get("name") or file)
        elif skipped is not None:
            suite.outcomes["skipped"] += 1
            suite.reasons[skipped.get("message") or ""] += 1
        else:
            suite.outcomes["passed"] += 1
    return suites
