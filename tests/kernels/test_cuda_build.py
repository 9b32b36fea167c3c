"""The CUDA part on any machine: what was built is there, and what cannot run says why."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import zorba_kernels as zk
from zorba_kernels.backends import cuda
from zorba_kernels.build import build_info, extension

FUNCTIONS = (
    *("cuda_add_noise_program", "cuda_add_noise_single", "cuda_fingerprint", "cuda_noise"),
    *("cuda_tile_ends", "cuda_unavailable", "cuda_workspace_bytes"),
)
built = pytest.mark.skipif(not build_info()["cuda"], reason="built without CUDA")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


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


@built
def test_cpu_tensors_never_reach_a_launch():
    table = zk.ParamTable({"w": torch.ones(4)})
    with pytest.raises(ValueError, match="serves CUDA tensors"):
        cuda.run(table, table, zk.Program(1, 1.0))
    with pytest.raises(ValueError, match="serves CUDA tensors"):
        cuda.fingerprint(table)


@pytest.mark.parametrize(
    ("compiled", "reason", "said"),
    [
        (SimpleNamespace(cuda=False), None, "without CUDA.*nvcc|ROCm"),
        (None, "the compiled part is missing", "the compiled part is missing"),
    ],
    ids=["built without CUDA", "not built"],
)
def test_what_was_not_built_says_so(monkeypatch, compiled, reason, said):
    monkeypatch.setattr(cuda, "extension", lambda: (compiled, reason))
    assert re.search(said, cuda.unavailable(torch.device("cuda")), re.DOTALL)


@built
@no_gpu
def test_no_device_says_why():
    assert "no usable CUDA device" in cuda.unavailable(torch.device("cuda"))


@built
@no_gpu
def test_a_cuda_error_is_an_exception():
    """Not an exit, and nothing that a later call would trip over."""
    for _ in range(2):
        with pytest.raises(RuntimeError, match="CUDA: "):
            extension()[0].cuda_noise(0, 0, 0, 8, 0, 1, 2, 0, 0, 0)
    assert zk.noise(8, seed=1, stream=2).shape == (8,)


@built
def test_import_needs_no_driver():
    code = """
import sys, importlib.util
spec = importlib.util.spec_from_file_location('_C', sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.cuda and 'torch' not in sys.modules
"""
    path = extension()[0].__file__
    subprocess.run([sys.executable, "-c", code, path], check=True, env={"CUDA_VISIBLE_DEVICES": ""})
