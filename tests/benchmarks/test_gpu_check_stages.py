"""The stages of ``make gpu-check`` in small, on the CPU: what they cover, and how they fail."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

import zorba_kernels as zk
from benchmarks.gpu_check import (
    bits,
    build,
    identity,
    offload,
    passes,
    sanitizer,
    seeds,
    suites,
    timing,
    weights,
)
from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.sanitized import DONE, main
from benchmarks.gpu_check.sizes import FULL, SMALL, llama
from tests.conftest import INTERPRETED
from zorba_kernels.backends import triton, triton_tuning
from zorba_kernels.table import DTYPE_CODES

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def report(tmp_path) -> Report:
    return Report(tmp_path / "report.json", time.monotonic() + 60)


def test_identity(report):
    identity.run(report, CPU, SMALL)
    assert report.passed
    assert len(report.checks) == 6
    assert all(check["elements"] >= SMALL.least_other for check in report.checks)
    assert all(check["all"] for check in report.checks[2:])


def test_offload(report, threads):
    torch.set_num_threads(1)
    offload.run(report, CPU, SMALL)
    assert report.passed
    assert [check["name"] for check in report.checks] == ["offloaded steps = resident steps"]
    assert report.targets[0]["unit"] == "x resident"


def test_offload_finds_other_weights(report, monkeypatch, threads):
    @contextlib.contextmanager
    def broken(model, mask, device):
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight[0, 0] += 1.0
        yield

    torch.set_num_threads(1)
    monkeypatch.setattr(offload, "offloaded", broken)
    offload.run(report, CPU, SMALL)
    assert not report.passed


def test_identity_finds_a_wrong_bit(report, monkeypatch):
    right = zk.noise

    def wrong(count, **given):
        z = right(count, **given)
        if given["backend"] == "reference" and given["offset"] <= 9000 < given["offset"] + count:
            z.view(torch.int32)[9000 - given["offset"]] ^= 1
        return z

    monkeypatch.setattr(identity.zk, "noise", wrong)
    for name in ("BLOCK_ELEMENTS", "stream_of"):
        monkeypatch.setattr(wrong, name, getattr(right, name), raising=False)
    identity.run(report, CPU, SMALL)
    failed = [c["name"] for c in report.checks if not c["passed"]]
    assert len(failed) == 4  # each comparison with reference, of either distribution
    assert all("reference" in name for name in failed)


def test_all_counters_are_all():
    """The whole range: 2**32 Gaussian counters a seed, 2**32 Rademacher counters in all."""
    blocks = zk.noise.BLOCK_ELEMENTS
    assert FULL.elements == zk.noise.MAX_ELEMENTS
    assert FULL.elements % FULL.chunk == FULL.elements % FULL.chunk_other == 0
    assert FULL.elements // blocks["gaussian"] == 1 << 32
    assert FULL.seeds["rademacher"] * FULL.elements // blocks["rademacher"] == 1 << 32


def test_weights_finds_a_wrong_bit(report, monkeypatch):
    right = zk.add_noise

    def wrong(table, out, *given, backend, **more):
        right(table, out, *given, backend=backend, **more)
        if backend == "reference":
            out.entries[4].tensor.view(torch.int16).reshape(-1)[77] ^= 1

    monkeypatch.setattr(weights.zk, "add_noise", wrong)
    weights.run(report, CPU, SMALL)
    assert len(report.checks) == 8
    assert not any(check["passed"] for check in report.checks)
    assert "reference, out of place, 1.torch.bfloat16" in report.checks[0]["error"]


def test_a_difference_is_found_in_its_slice(monkeypatch):
    monkeypatch.setattr(bits, "SLICE", 256)
    a = torch.randn(1000)
    b = a.clone()
    bits.assert_equal_bits(a, b, "same")
    b.view(torch.int32)[777] ^= 1
    with pytest.raises(AssertionError, match="from element 777 on: 1 of 1 elements differ"):
        bits.assert_equal_bits(a, b, "other")
    with pytest.raises(AssertionError, match="is compared with"):
        bits.assert_equal_bits(a, a.bfloat16(), "other dtype")


def test_seeds_and_passes(report):
    seeds.run(report, CPU, SMALL)
    passes.run(report, CPU, SMALL)
    assert report.passed
    assert len(report.checks) == 4
    names = {measure["name"] for measure in report.measures}
    assert {"copy", "three copies", "64 passes", "one pass, 64 rounds"} <= names
    assert {t["name"].split(",")[0] for t in report.targets} >= {"cpu", "step of 13 B weights"}


def test_seeds_finds_a_wrong_bit(report, monkeypatch):
    right = zk.add_noise_

    def wrong(table, seeds, *given, rounds=None, **more):
        right(table, seeds, *given, rounds=rounds, **more)
        if rounds is not None:
            table.entries[-1].tensor.view(torch.int16).reshape(-1)[-1] ^= 1

    monkeypatch.setattr(seeds.zk, "add_noise_", wrong)
    seeds.run(report, CPU, SMALL)
    assert [check["passed"] for check in report.checks] == [False, True, False, True]


def test_shapes_of_models():
    count = sum(torch.Size(shape).numel() for shape in llama(32, 4096, 11008, 32000).values())
    assert count == 6_738_415_616
    assert len(llama(32, 4096, 11008, 32000)) == 291


def test_too_slow_calls_are_not_repeated():
    calls = {"slow": lambda: time.sleep(0.01)}
    with pytest.raises(TimeoutError, match="1000 runs of 1 calls"):
        timing.time_in_turn(calls, CPU, 1000, seconds=1.0)
    times = timing.time_in_turn(calls, CPU, 3, seconds=60.0)["slow"]
    assert 0.01 <= times.least <= times.median <= times.most


def test_times_of_a_gpu_come_from_events(monkeypatch):
    """With a stand-in for CUDA, whose clock ticks once an event and whose calls take 7 bytes."""
    ticks = iter(range(1000))
    held = {"now": 100, "peak": 0}

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.tick = next(ticks)

        def elapsed_time(self, other) -> float:
            return 1e3 * (other.tick - self.tick)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held["peak"])
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device: held.update(peak=held["now"])
    )
    calls = {"a": lambda: held.update(peak=107), "b": lambda: next(ticks)}
    times = timing.time_in_turn(calls, torch.device("cuda"), 5, seconds=60.0)
    assert times["a"] == (1.0, 1.0, 1.0, 7)
    assert times["b"] == (2.0, 2.0, 2.0, 0)


def test_the_build_is_for_this_gpu_and_must_have_cuda(monkeypatch):
    ran = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(build.subprocess, "run", lambda c, **given: ran.append((c, given)))
    monkeypatch.setattr(build, "tool", lambda name: f"/cuda/{name}")
    facts = build.build(torch.device("cuda"))
    assert facts == {"ZORBA_CUDA": "1", "ZORBA_CUDA_ARCHS": "90", "NVCC": "/cuda/nvcc"}
    ((command, given),) = ran
    assert command[1:] == ["setup.py", "build_ext", "--inplace"]
    assert given["check"]
    assert facts.items() <= given["env"].items()


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
    for op in ("add_noise", "noise", "fingerprint"):
        triton.kernel(op).device_caches.pop(gpu.get_current_device.return_value, None)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
def test_what_is_compiled_ahead_is_what_triton_tunes(compiled):
    """Every pass, and every candidate that is measured for it, is found in Triton's cache."""
    from benchmarks.gpu_check import precompile

    kinds = itertools.product(
        (1, [1, 2]), ("gaussian", "rademacher"), ("nearest", "stochastic"), (None, 0.1)
    )
    table = zk.ParamTable({str(dtype): torch.zeros(8, dtype=dtype) for dtype in DTYPE_CODES})
    for seeds_, distribution, rounding, decay in kinds:
        coefs = 0.1 if seeds_ == 1 else [0.1, 0.2]
        program = zk.Program(seeds_, coefs, distribution, rounding, decay=decay)
        triton.run(table, table, program)
    for distribution in ("gaussian", "rademacher"):
        triton.noise(8, 0, 1, 2, 0, distribution, CPU)
    triton.fingerprint(table)
    launched = set(compiled)
    compiled.clear()
    for kernel in map(triton.kernel, ("add_noise", "noise", "fingerprint")):
        kernel.device_caches.clear()  # so that Triton looks on disk again
    for part in range(3):
        precompile.main(part, 3)
    assert len(compiled) == len(set(compiled)) > 100
    assert set(compiled) == launched


def test_sanitized_script(capsys):
    main("cpu", "cpu", ["gaussian", "rademacher"])
    assert capsys.readouterr().out == f"{DONE}\n"


@pytest.mark.parametrize(
    ("outcome", "output", "errors", "runs"),
    [
        ("passed", "========= ERROR SUMMARY: 0 errors", 0, True),
        ("failed", "========= Invalid __global__ read\n========= ERROR SUMMARY: 3 errors", 3, True),
        ("passed", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, True),
        ("failed", "RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", 1, True),
        ("failed", "Error: Device not supported\n= ERROR SUMMARY: 1 error", 1, False),
        ("timed out", "ERROR SUMMARY: 0 errors", 0, False),
        ("failed", "Segmentation fault", None, False),
    ],
)
def test_what_the_sanitizer_says(outcome, output, errors, runs):
    assert sanitizer.errors_of(output) == errors
    assert (sanitizer.cannot_run(outcome, output) is None) == runs


def test_what_pytest_says(tmp_path, monkeypatch):
    """A file that cannot be imported keeps no other from running."""
    (tmp_path / "test_good.py").write_text(
        "import pytest\ndef test_a(): pass\n@pytest.mark.skip(reason='one GPU')\n"
        "def test_b(): pass\n"
    )
    (tmp_path / "test_bad.py").write_text("def test_c(): assert False\n")
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name\n")
    monkeypatch.setattr(suites, "ROOT", tmp_path)
    found, status = suites.run_pytest(["test_good.py", "test_bad.py", "test_broken.py"])
    assert status == 1
    assert found["test_good.py"].outcomes == Counter(passed=1, skipped=1)
    assert found["test_good.py"].reasons == Counter({"one GPU": 1})
    assert found["test_bad.py"].failed == ["test_c"]
    assert found["test_broken.py"].outcomes == Counter(failed=1)


def test_suites_of_the_gpu_are_there():
    assert all((ROOT / name).is_file() for name in suites.GPU_TESTS)


def test_machine_is_described_without_an_installation(monkeypatch):
    from zorba.machine import description

    def missing(name):
        raise description.PackageNotFoundError(name)

    monkeypatch.setattr(description, "version", missing)
    about = build.describe(CPU)
    assert about["zorba_kernels"] is None
    assert about["torch"] == torch.__version__
