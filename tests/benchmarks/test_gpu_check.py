"""``make gpu-check`` where there is no GPU: a rehearsal, and what it does with what goes wrong."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import psutil
import pytest
import torch

import zorba_kernels as zk
from benchmarks.bench import assert_equal_bits
from benchmarks.gpu import __main__ as driver
from benchmarks.gpu.stages import STAGES, Stage, run_process
from benchmarks.gpu.test_backends import precompile
from benchmarks.gpu.test_sanitizer import errors_of
from benchmarks.record import read_results, write_results
from benchmarks.sizes import GPU
from tests.conftest import INTERPRETED
from zorba_kernels.backends import triton, triton_tuning
from zorba_kernels.dispatch import NoiseKey, RowNoise
from zorba_kernels.table import DTYPE_CODES

ROOT = Path(__file__).resolve().parents[2]
FILES = [file for stage in STAGES for file in stage.files if file.startswith("benchmarks/")]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so_and_ends_with_2(tmp_path):
    done = run("benchmarks.gpu", "--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout.startswith("gpu-check needs a GPU, and there is none to use: torch")
    assert list(tmp_path.iterdir()) == []


def test_rehearsal_of_the_command(tmp_path):
    """The whole way through the driver, for stages that take a moment."""
    done = run("benchmarks.gpu", "--rehearse", "--out", str(tmp_path), "build", "sanitizer")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("gpu-rehearsal-*")
    result = json.loads(path.read_text())
    assert (result["passed"], list(result["stages"])) == (True, ["build", "sanitizer"])
    assert "PASSED in" in done.stdout


def test_rehearsal_of_every_check_and_measurement(tmp_path, full):
    """In one process, which saves starting Python for each stage; measurements with --full."""
    path = tmp_path / "record.json"
    options = ["-p", "benchmarks.record", "--rehearse", "--record", str(path)]
    files = [file for file in FILES if full or file.startswith("benchmarks/gpu/")]
    done = run("pytest", *options, "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    tests = json.loads(path.read_text())["stages"]["all"]["tests"]
    passed = {row["test"].split("[")[0] for row in tests if row["outcome"] == "passed"}
    compared = [row for row in tests if "elements" in row.get("facts", {})]
    names = {m["name"] for row in tests for m in row.get("measures", [])}
    measurements = {
        *("bench_pass", "bench_fingerprint", "bench_host_time", "bench_passes_of_a_step"),
        *("bench_bits", "bench_speed", "bench_step", "bench_peers"),
    }
    assert {name.split("::")[-1] for name in passed} == {
        *("test_description", "test_backends_serve", "test_all_counters", "test_weights"),
        *("test_chunks_in_random_order", "test_perturb", *(measurements if full else ())),
    }
    assert len(compared) == 3 + 6 + 12 + 3 * full
    wanted = {"copy", "64 passes", "one pass, 64 rounds", "MeZO", "offload"}
    assert not full or wanted <= names


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Runs a test file that is written here as a stage; returns what was recorded of it."""
    path = tmp_path / "results.json"
    write_results(path, {"stages": {}})

    def run_one(code: str, optional: bool = False, left: float = 100.0):
        (tmp_path / "test_it.py").write_text(code)
        one = Stage("it", "", 60.0, 1.0, (str(tmp_path / "test_it.py"),), optional)
        driver.run_stage(one, path, left, arch="90")
        return read_results(path)["stages"]["it"]

    return run_one


FIRST = "import os\ndef test_first(): pass\n"
CRASH, WRONG = (FIRST + f"def test_second(): {it}" for it in ("os.abort()", "assert 1 == 2"))


@pytest.mark.parametrize(
    ("code", "optional", "good", "outcome", "tests"),
    [
        # A peer that does not run says nothing against the kernels; a failed check does.
        (CRASH, False, False, "failed: ended with status -6", ["passed"]),
        (CRASH, True, True, "failed: ended with status -6", ["passed"]),
        (WRONG, True, False, "failed", ["passed", "failed"]),
    ],
    ids=["crash", "crash of a peer", "wrong in a peer"],
)
def test_a_stage_keeps_what_it_found(stage, code, optional, good, outcome, tests):
    row = stage(code, optional)
    assert (row["good"], row["outcome"]) == (good, outcome)
    assert [test["outcome"] for test in row["tests"]] == tests
    assert "test_second" in row.get("running", row["tests"][-1].get("error", ""))


def test_a_stage_without_time_is_left_out(stage):
    late = stage(FIRST, left=0.5)
    assert not late["good"]
    assert "needs at least 1" in late["outcome"]


def test_a_process_that_is_stopped_takes_its_children_along(tmp_path):
    pid = tmp_path / "pid"
    command = ["sh", "-c", f"sleep 600 & echo $! > {pid}; wait"]
    assert run_process(command, 5.0, {}) == "stopped after 5 s"
    # Killed is not gone yet: the system ends a process in its own time, and nobody reaps this one.
    with contextlib.suppress(psutil.NoSuchProcess):
        child = psutil.Process(int(pid.read_text()))
        for _ in range(60_000):  # ten minutes: only a child that was left alive lasts that long
            if child.status() == psutil.STATUS_ZOMBIE:
                return
            time.sleep(0.01)
        pytest.fail(f"{child} outlived the process that started it")


def test_the_time_of_all_stages_is_enough():
    assert sum(stage.least for stage in STAGES if not stage.optional) < driver.SECONDS / 2
    assert all(stage.least <= stage.limit for stage in STAGES)
    assert all((ROOT / file).exists() for stage in STAGES for file in stage.files)


def test_all_counters_are_all():
    """The whole range: 2**32 Gaussian counters a seed, 2**32 Rademacher counters in all."""
    blocks = zk.noise.BLOCK_ELEMENTS
    assert GPU.elements == zk.noise.MAX_ELEMENTS
    assert GPU.elements % GPU.chunk == GPU.elements % GPU.chunk_other == 0
    assert GPU.elements // blocks["gaussian"] == 1 << 32
    assert GPU.seeds["rademacher"] * GPU.elements // blocks["rademacher"] == 1 << 32


def test_a_wrong_bit_is_found_in_its_slice(monkeypatch):
    monkeypatch.setattr("benchmarks.bench.SLICE", 256)
    a = torch.randn(1000)
    b = a.clone()
    assert_equal_bits(a, b, "same")
    b.view(torch.int32)[777] ^= 1
    with pytest.raises(AssertionError, match=r"element 777 is .* 1 differ from there on"):
        assert_equal_bits(a, b, "other")
    with pytest.raises(AssertionError, match="is compared with"):
        assert_equal_bits(a, a.bfloat16(), "other dtype")


@pytest.mark.parametrize(
    ("output", "errors"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0),
        ("========= Invalid __global__ read\n========= ERROR SUMMARY: 3 errors", 3),
        ("RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", 1),
        ("Error: Device not supported\n= ERROR SUMMARY: 1 error", None),
        ("Segmentation fault", None),
    ],
)
def test_errors_of_the_sanitizer(output, errors):
    assert errors_of(output) == errors


# --- Triton's cache -------------------------------------------------------------------------------

OPS = ("add_noise", "noise", "fingerprint", "perturbed_linear")


@pytest.fixture
def compiled(monkeypatch, tmp_path) -> list[tuple[str, str]]:
    """By what Triton's cache knows each kernel that it is to compile for a GPU, which is not there.

    Compiling and running do nothing; everything before that is Triton's own.
    """
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    found = []

    def compile_source(source, target, options, **given):
        found.append((source.hash(), make_backend(target).parse_options(options).hash()))
        return MagicMock()

    gpu = MagicMock()
    gpu.get_current_device.return_value = object()  # Triton remembers what it has by device
    gpu.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    gpu.get_benchmarker.return_value = lambda call, quantiles: (call(), [1.0] * 3)[1]
    for name in ("jit", "autotuner"):
        monkeypatch.setattr(f"triton.runtime.{name}.driver", SimpleNamespace(active=gpu))
    monkeypatch.setattr("triton.compiler.compile", compile_source)
    monkeypatch.setattr(triton_tuning, "SIZES", (1,))
    monkeypatch.setattr(triton_tuning, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # of earlier measurements
    yield found
    for op in OPS:
        triton.kernel(op).device_caches.pop(gpu.get_current_device.return_value, None)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
def test_what_is_compiled_ahead_is_what_triton_tunes(compiled):
    """Every pass, and every candidate that is measured for it, is found in Triton's cache."""
    table = zk.ParamTable({str(dtype): torch.zeros(8, dtype=dtype) for dtype in DTYPE_CODES})
    kinds = (([1], [1, 2]), zk.noise.DISTRIBUTIONS, zk.noise.ROUNDINGS, (None, 0.1))
    for seeds, distribution, rounding, decay in itertools.product(*kinds):
        program = zk.Program(seeds, [0.1] * len(seeds), distribution, rounding, decay=decay)
        triton.run(table, table, program)
    for distribution in zk.noise.DISTRIBUTIONS:
        triton.noise(8, 0, NoiseKey(1, 2, 0, distribution), torch.device("cpu"))
    triton.fingerprint(table)
    inputs = (None, torch.zeros(1, 1, 8))
    for dtype, x, transposed in itertools.product(DTYPE_CODES, inputs, (False, True)):
        key = RowNoise(1, 2, torch.zeros(1, dtype=torch.int64), torch.ones(1), transposed)
        triton.perturb(x, torch.zeros(1, 1, 8, dtype=dtype), key)
    launched = set(compiled)
    compiled.clear()
    for kernel in map(triton.kernel, OPS):
        kernel.device_caches.clear()  # so that Triton looks on disk again
    for part in range(3):
        precompile(part, 3)
    assert len(compiled) == len(set(compiled)) > 100
    assert set(compiled) == launched
