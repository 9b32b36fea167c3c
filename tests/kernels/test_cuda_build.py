"""The CUDA part on any machine: what was built is there, and what cannot run says why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zorba_kernels as zk
from zorba_kernels.backends import cuda
from zorba_kernels.build import build_info, extension

ROOT = Path(__file__).parents[2]
FUNCTIONS = (
    "cuda_add_noise_program",
    "cuda_add_noise_single",
    "cuda_fingerprint",
    "cuda_noise",
    "cuda_tile_ends",
    "cuda_unavailable",
    "cuda_workspace_bytes",
)
built = pytest.mark.skipif(not build_info()["cuda"], reason="built without CUDA")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def table():
    return zk.ParamTable({"w": torch.ones(4)})


def test_registered_first():
    assert next(row.name for row in zk.backends()) == "cuda"


@built
def test_functions_exist():
    assert all(callable(getattr(extension()[0], name)) for name in FUNCTIONS)


@built
def test_tile_ends():
    """A tile is 4096 elements, aligned in the whole parameter; an empty tensor has none."""
    sizes = {"a": (4096, 0), "b": (4096, 1), "c": (0, 5), "d": (1, 4095), "e": (2, 4095)}
    tensors = {n: torch.zeros(size) for n, (size, _) in sizes.items()}
    made = zk.ParamTable(tensors, offsets={n: offset for n, (_, offset) in sizes.items()})
    packed, ends = made.packed(made), torch.empty(5, dtype=torch.int64)
    total = extension()[0].cuda_tile_ends(packed.data_ptr(), 5, ends.data_ptr())
    assert ends.tolist() == [1, 3, 3, 4, 6]
    assert total == 6


def test_cpu_tensors_are_refused():
    weights = table()
    before = weights.entries[0].tensor.clone()
    with pytest.raises(zk.BackendUnavailableError, match="serves CUDA tensors, not cpu"):
        zk.add_noise_(weights, 1, 1.0, backend="cuda")
    with pytest.raises(zk.BackendUnavailableError, match="serves CUDA tensors, not cpu"):
        zk.fingerprint(weights, backend="cuda")
    with pytest.raises(zk.BackendUnavailableError, match="serves CUDA tensors, not cpu"):
        zk.noise(8, seed=1, stream=2, backend="cuda")
    assert torch.equal(weights.entries[0].tensor, before)


@built
def test_cpu_tensors_never_reach_a_launch():
    """Also when the module is called directly."""
    with pytest.raises(ValueError, match="serves CUDA tensors"):
        cuda.run(table(), table(), zk.Program(1, 1.0))
    with pytest.raises(ValueError, match="serves CUDA tensors"):
        cuda.fingerprint(table())


def test_built_without_cuda(monkeypatch):
    class Compiled:
        cuda = False

    monkeypatch.setattr(cuda, "extension", lambda: (Compiled, None))
    reason = cuda.unavailable(torch.device("cuda"))
    assert reason is not None
    assert ("without CUDA" in reason and "nvcc" in reason) or "ROCm" in reason


def test_no_extension(monkeypatch):
    monkeypatch.setattr(cuda, "extension", lambda: (None, "the compiled part is missing"))
    assert cuda.unavailable(torch.device("cuda")) == "the compiled part is missing"


@built
@no_gpu
def test_no_device_says_why():
    reason = cuda.unavailable(torch.device("cuda"))
    assert reason is not None
    assert "no usable CUDA device" in reason


@built
@no_gpu
def test_a_cuda_error_is_an_exception():
    """Not an exit, and nothing that a later call would trip over."""
    for _ in range(2):
        with pytest.raises(RuntimeError, match="CUDA: "):
            extension()[0].cuda_noise(0, 0, 0, 8, 0, 1, 2, 0, 0)
    assert zk.noise(8, seed=1, stream=2).shape == (8,)


@built
def test_import_needs_no_driver():
    """The extension loads without torch and without a CUDA driver library on the path."""
    code = "import sys, importlib.util as u; s = u.spec_from_file_location('_C', sys.argv[1])"
    code += "; m = u.module_from_spec(s); s.loader.exec_module(m)"
    code += "; assert m.cuda and 'torch' not in sys.modules"
    path = extension()[0].__file__
    subprocess.run([sys.executable, "-c", code, path], check=True, env={"CUDA_VISIBLE_DEVICES": ""})


def setup_with(tmp_path, wish, nvcc):
    """Asks setup.py for its toolchain."""
    code = (
        "import sys, setuptools; setuptools.setup = lambda **k: None; sys.path.insert(0, '.');"
        "import importlib.util as u; s = u.spec_from_file_location('s', 'setup.py');"
        "m = u.module_from_spec(s); s.loader.exec_module(m); print('found', m.cuda_toolchain())"
    )
    environment = {**os.environ, "ZORBA_CUDA": wish, "NVCC": str(nvcc)}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def broken_nvcc(tmp_path, script):
    path = tmp_path / "nvcc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="no source tree")
@pytest.mark.parametrize("script", ["exit 1", "echo '#$ LIBRARIES= \"-L/nowhere\"' >&2", None])
def test_a_broken_nvcc(tmp_path, script):
    """It must not fail an ordinary installation, and must fail one that asks for CUDA."""
    nvcc = tmp_path / "missing" if script is None else broken_nvcc(tmp_path, script)
    auto = setup_with(tmp_path, "auto", nvcc)
    assert auto.returncode == 0, auto.stderr
    assert "building without CUDA" in auto.stdout
    assert "found None" in auto.stdout
    hard = setup_with(tmp_path, "1", nvcc)
    assert hard.returncode != 0
    assert "ZORBA_CUDA=1, but" in hard.stderr


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="no source tree")
def test_an_nvcc_that_finds_its_libraries_but_cannot_compile(tmp_path):
    (tmp_path / "libcudart_static.a").touch()
    script = f"""case "$*" in
      *--dryrun*) echo '#$ LIBRARIES= "-L{tmp_path}"' >&2 ;;
      *--list-gpu-arch*) echo compute_90 ;;
      *) exit 1 ;;
    esac"""
    nvcc = broken_nvcc(tmp_path, script)
    auto = setup_with(tmp_path, "auto", nvcc)
    assert auto.returncode == 0, auto.stderr
    assert "does not compile" in auto.stdout
    assert setup_with(tmp_path, "1", nvcc).returncode != 0


def test_unknown_wish(tmp_path):
    assert "expected auto, 0 or 1" in setup_with(tmp_path, "yes", "nvcc").stderr
