"""The stages of ``make gpu-check``: what each runs, for how long, and how its process ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CUDA_TOOLS = "/usr/local/cuda/bin"  # where they are if not on the PATH


class Stage(NamedTuple):
    """Test files that run in one process."""

    name: str
    about: str
    limit: float  # seconds
    least: float  # with less time left the stage is left out
    files: tuple[str, ...]
    optional: bool = False  # only a failed check of it fails the run

    def command(self, results: Path, limit: float, rehearse: bool) -> list[str]:
        if not self.files:
            # A rehearsal only tries whether setup.py runs: it must not change what is installed.
            words = ["--name"] if rehearse else ["build_ext", "--inplace"]
            return [sys.executable, "setup.py", *words]
        deadline = time.monotonic() + 0.93 * limit  # a clock that all processes share
        command = [sys.executable, "-m", "pytest", "-p", "benchmarks.record", "-rfs"]
        command += ["--record", str(results), "--stage", self.name, "--deadline", str(deadline)]
        command += ["-p", "no:cacheprovider", "--maxfail=25", "--continue-on-collection-errors"]
        if self.name == "suites":
            return [*command, *(["tests/kernels/test_golden.py"] if rehearse else gpu_suites())]
        return [*command, *(["--rehearse"] if rehearse else []), *self.files]


def gpu_suites() -> list[str]:
    """Returns ``-m gpu`` and the files that have such tests; others may need more packages."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [str(f.relative_to(ROOT)) for f in files if "pytest.mark.gpu" in f.read_text()]
    return ["-m", "gpu", *marked]


# What proves comes first, and what may be left out last.
STAGES = (
    Stage("build", "the extension, for this GPU", 150, 30, ()),
    Stage("backends", "versions, device, kernels", 110, 20, ("benchmarks/gpu/test_backends.py",)),
    Stage("identity", "equal noise everywhere", 80, 40, ("benchmarks/gpu/test_identity.py",)),
    Stage("weights", "equal weights everywhere", 90, 20, ("benchmarks/gpu/test_weights.py",)),
    Stage("suites", "tests on the GPU", 150, 30, ("tests",)),
    Stage("passes", "speed of a pass and of a step", 75, 20, ("benchmarks/bench_passes.py",)),
    Stage("seeds", "64 seeds in a pass", 60, 20, ("benchmarks/bench_seeds.py",)),
    Stage("perturb", "noise in outputs", 45, 15, ("benchmarks/gpu/test_perturb.py",)),
    Stage("offload", "idle blocks on the host", 45, 20, ("benchmarks/bench_offload.py",)),
    Stage("peers", "speed against others", 60, 20, ("benchmarks/bench_peers.py",), True),
    Stage("sanitizer", "compute-sanitizer", 90, 20, ("benchmarks/gpu/test_sanitizer.py",), True),
)


def environment() -> dict[str, str]:
    """Returns the caller's, less what would force a backend, and with the source tree."""
    forcing = ("ZORBA_BACKEND", "ZORBA_CPU_ISA", "TRITON_INTERPRET")
    kept = {name: value for name, value in os.environ.items() if name not in forcing}
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [kept.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return kept | own | {"PYTHONUNBUFFERED": "1"}


def run_process(command: list[str], limit: float, variables: Mapping[str, str]) -> str:
    """Runs a command in the source tree; returns "passed", "failed" or what else became of it."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment() | dict(variables), stdin=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    finally:
        # Also what the stage started and left behind, a compiler or a sanitizer.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if status in (0, 1):
        return "failed" if status else "passed"
    return f"failed: ended with status {status}"


def tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=CUDA_TOOLS)


def output_of(*command: str) -> str | None:
    """Returns what a command prints; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip()[:2000] if done.returncode == 0 else None
