"""Illegal use on a GPU is refused before any launch, and no launch error ends the process.

What can be tried without a GPU is in test_cuda_build.py and test_table.py.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

import zorba_kernels as zk
from tests.kernels.bits import assert_same_bits
from zorba_kernels.build import extension

pytestmark = pytest.mark.gpu

GPU_BACKENDS = [row.name for row in zk.backends("cuda") if row.name in ("cuda", "triton")]


@pytest.fixture(params=GPU_BACKENDS)
def backend(request):
    row = next(r for r in zk.backends("cuda") if r.name == request.param)
    if not row.available:
        pytest.skip(str(row.reason))
    return request.param


def test_cpu_tensors(backend):
    weights = torch.ones(4097)
    for call in (
        lambda: zk.add_noise_(zk.ParamTable({"w": weights}), 1, 1.0, backend=backend),
        lambda: zk.fingerprint(zk.ParamTable({"w": weights}), backend=backend),
        lambda: zk.noise(8, seed=1, stream=2, backend=backend),
    ):
        with pytest.raises(zk.BackendUnavailableError, match="not cpu"):
            call()
    assert bool((weights == 1).all())


def test_cuda_tensors_to_the_cpu_backend():
    with pytest.raises(zk.BackendUnavailableError, match="serves CPU tensors, not cuda"):
        zk.add_noise_(zk.ParamTable({"w": torch.ones(8, device="cuda")}), 1, 1.0, backend="cpu")


def test_tables_on_two_devices(backend):
    source, out = torch.ones(8, device="cuda"), torch.zeros(8)
    with pytest.raises(ValueError, match="the tables are on"):
        zk.add_noise(
            zk.ParamTable({"w": source}), zk.ParamTable({"w": out}), 1, 1.0, backend=backend
        )
    with pytest.raises(ValueError, match="a ParamTable lives on one device"):
        zk.ParamTable({"a": source, "b": out})
    assert not out.any()


def test_a_device_that_is_not_there(backend):
    with pytest.raises((zk.BackendUnavailableError, RuntimeError)):
        zk.noise(8, seed=1, stream=2, device=f"cuda:{torch.cuda.device_count()}", backend=backend)
    z = zk.noise(8, seed=1, stream=2, device="cuda", backend=backend)
    assert_same_bits(z.cpu(), zk.noise(8, seed=1, stream=2))


@pytest.mark.parametrize("change", ["resized", "moved", "freed"])
def test_a_table_that_is_out_of_date(backend, change):
    parameter = torch.nn.Parameter(torch.zeros(100, device="cuda"))
    table = zk.ParamTable({"w": parameter})
    zk.add_noise_(table, 1, 0.1, backend=backend)  # its device copy exists from here on
    before = parameter.detach().clone()
    if change == "resized":
        parameter.data = parameter.data[:50]
    elif change == "moved":
        parameter.data = parameter.data.clone()
    else:
        parameter.data.untyped_storage().resize_(0)
    for call in (
        lambda: zk.add_noise_(table, 1, 0.1, backend=backend),
        lambda: zk.fingerprint(table, backend=backend),
    ):
        with pytest.raises(RuntimeError, match="make a new table"):
            call()
    if change != "freed":
        assert_same_bits(parameter.detach().cpu(), before[: parameter.numel()].cpu())


def test_a_launch_error_is_an_exception():
    """In a process of its own: an address fault leaves its CUDA context unusable."""
    if extension()[0] is None or not extension()[0].cuda:
        pytest.skip("built without CUDA")
    script = textwrap.dedent("""
        import torch
        from zorba_kernels.build import extension
        torch.ones(1, device="cuda")
        compiled = extension()[0]
        try:
            compiled.cuda_noise(0, 0, 1 << 20, 1 << 20, 0, 1, 2, 0, 0)  # nobody's memory
            torch.cuda.synchronize()
        except RuntimeError as error:
            print("fault:", str(error).splitlines()[0])
        try:
            compiled.cuda_noise(0, 0, 1 << 20, 1 << 20, 0, 1, 2, 0, 0)
        except RuntimeError as error:
            print("launch:", error)
        print("alive")
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["fault", "launch", "alive"], done
    assert lines[1].startswith("launch: CUDA: ")
