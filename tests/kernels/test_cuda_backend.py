"""The GPU backends against the CPU, on a GPU, and what they refuse before any launch.

No figure or result from one is recorded yet. What can be tried without a GPU is in
test_cuda_build.py and test_table.py.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import zorba_kernels as zk
from tests.kernels.bits import DTYPES, assert_same_bits, changed, written
from zorba_kernels.backends import cuda, triton, triton_tuning
from zorba_kernels.build import extension

pytestmark = pytest.mark.gpu

SIZES = (0, 1, 7, 511, 512, 1023, 4096, 4097, 9001, 100_003)
MODULES = {"cuda": cuda, "triton": triton}


@pytest.fixture(params=MODULES)
def backend(request):
    reason = MODULES[request.param].unavailable(torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    return request.param


def compare(backend, weights, *args, **kwargs):
    """In place on the GPU and out of place on the GPU against the best CPU backend."""
    expected = changed(weights, *args, **kwargs)
    there = {name: w.cuda() for name, w in weights.items()}
    for make in (changed, written):
        results = make(there, *args, **kwargs, backend=backend)
        assert_same_bits({name: w.cpu() for name, w in results.items()}, expected)


@pytest.mark.covering(size=SIZES)
def test_noise(backend, rng, distribution, size):
    for offset in (0, 3, 4095, (1 << 35) - size):
        call = {**rng.key(), "distribution": distribution, "offset": offset}
        mine = zk.noise(size, **call, device="cuda", backend=backend)
        assert_same_bits(mine.cpu(), zk.noise(size, **call))


@pytest.mark.covering(terms=[1, 3, 19], size=SIZES)
def test_add_noise(backend, rng, dtype, rounding, distribution, size, terms):
    for offset in (0, 5, 512):
        compare(
            backend, {"w": rng.weights(size, dtype)}, rng.integers(terms), rng.coefs(terms),
            distribution, rounding, samples=rng.integers(terms, bits=31), offsets={"w": offset},
        )  # fmt: skip


def test_rounds_groups_decay_and_dtypes(backend, rng, rounding, distribution):
    weights = {f"{i}": rng.weights(3000 + 700 * i, DTYPES[i % 3]) for i in range(40)}
    groups = {name: int(name) % 3 for name in weights}
    coefs = rng.coefs(3, 9)
    coefs[1, 3:] = 0
    compare(
        backend, weights, rng.integers(9), coefs, distribution, rounding, rng.integers(3),
        rounds=[2, 0, 7], decay=[[0.0] * 3, [0.01, 0.0, 0.0], [0.0, 0.5, 0.1]], groups=groups,
    )  # fmt: skip


def test_misaligned(backend, rng, dtype, rounding):
    base = rng.weights(10_000, dtype)
    for shift in (1, 3, 8):
        there = base.cuda()
        table = zk.ParamTable({"w": there[shift:]})
        zk.add_noise_(table, 1, 1e-3, rounding=rounding, backend=backend)
        expected = changed({"w": base[shift:]}, 1, 1e-3, rounding=rounding)["w"]
        assert_same_bits(there.cpu(), torch.cat([base[:shift], expected]))


def test_special_values(backend, rng, dtype, rounding):
    info = torch.finfo(dtype)
    values = [torch.inf, -torch.inf, torch.nan, info.max, info.min, info.tiny, 0.0, -0.0]
    weights = rng.weights(8192, dtype)
    weights[100:4100:40] = torch.tensor(values * 13, dtype=dtype)[:100]
    for coef in (1e-3, 3e38):
        compare(backend, {"w": weights}, 1, coef, rounding=rounding)


def test_fingerprint(backend, rng):
    weights = {f"{i}": rng.weights(n, DTYPES[i % 3]) for i, n in enumerate([0, 1, 5, 4097, 70_001])}
    there = {name: w.cuda() for name, w in weights.items()}
    shifted = {"w": there["4"][1:]}, {"w": weights["4"][1:]}
    for mine, expected in ((there, weights), shifted):
        found = zk.fingerprint(zk.ParamTable(mine), backend=backend)
        assert found == zk.fingerprint(zk.ParamTable(expected))


def test_another_stream(backend, rng):
    weights = rng.weights(1 << 20, torch.bfloat16)
    mine = weights.cuda()
    table, expected = zk.ParamTable({"w": mine}), zk.ParamTable({"w": weights})
    zk.add_noise_(table, 1, 0.0, backend=backend)  # the table is copied on the first stream
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for seed in range(20):
            zk.add_noise_(table, [seed, seed + 1], [1e-3] * 2, backend=backend)
    stream.synchronize()
    for seed in range(20):
        zk.add_noise_(expected, [seed, seed + 1], [1e-3] * 2)
    assert_same_bits(mine.cpu(), weights)


def test_graph_with_seeds_on_the_device(backend, rng):
    """A captured program reads its seeds and coefficients when it is replayed."""
    weights = rng.weights(100_000, torch.bfloat16)
    mine = weights.cuda()
    table, expected = zk.ParamTable({"w": mine}), zk.ParamTable({"w": weights})
    program = zk.Program([1, 2], [0.0, 0.0], rounding="stochastic", rounding_seed=3)
    on_device = MODULES[backend].DeviceProgram(program, table)
    on_device.run(table, table)  # coefficients of 0: only warms up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        on_device.run(table, table)
    assert_same_bits(mine.cpu(), weights)
    for step in range(3):
        seeds = [10 + step, 20 + step]
        on_device.arrays["seeds"].copy_(torch.tensor(seeds))
        on_device.arrays["rounding_seeds"].fill_(step)
        on_device.arrays["coefs"].fill_(1e-3)
        graph.replay()
        zk.add_noise_(expected, seeds, [1e-3] * 2, rounding="stochastic", rounding_seed=step)
    assert_same_bits(mine.cpu(), weights)


def test_a_pass_that_is_tuned_changes_weights_once(backend, rng, distribution):
    """Large tables: the Triton kernels measure how to run at their first use."""
    weights = rng.weights(triton_tuning.SIZES[0] + 12_345, torch.bfloat16)
    for seed in range(2):
        compare(backend, {"w": weights}, seed, 1e-3, distribution, "stochastic", offsets={"w": 7})


def test_the_current_device_is_left_alone(backend, rng):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    table = zk.ParamTable({"w": rng.weights(100, torch.float32).to("cuda:1")})
    zk.add_noise_(table, 1, 1.0, backend=backend)
    assert torch.cuda.current_device() == 0


def test_more_than_two_to_the_31_elements(backend):
    count = (1 << 31) + 4097
    if torch.cuda.mem_get_info()[0] < 3 * 2 * count:
        pytest.skip("not enough memory")
    weights = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    zk.add_noise_(zk.ParamTable({"w": weights}), 5, 1.0, "rademacher", backend=backend)
    stream = zk.noise.stream_of("w")
    for start in (0, (1 << 31) - 100, count - 5000):
        z = zk.noise(5000, seed=5, stream=stream, distribution="rademacher", offset=start)
        part = weights[start : start + 5000].float().cpu()
        assert_same_bits(part, z[: len(part)])


# --- Illegal use ---------------------------------------------------------------------------------


def test_tables_on_two_devices(backend):
    source, out = torch.ones(8, device="cuda"), torch.zeros(8)
    tables = zk.ParamTable({"w": source}), zk.ParamTable({"w": out})
    with pytest.raises(ValueError, match="the tables are on"):
        zk.add_noise(*tables, 1, 1.0, backend=backend)
    with pytest.raises(ValueError, match="a ParamTable lives on one device"):
        zk.ParamTable({"a": source, "b": out})
    assert not out.any()


def test_a_device_that_is_not_there(backend):
    with pytest.raises((zk.BackendUnavailableError, RuntimeError)):
        zk.noise(8, seed=1, stream=2, device=f"cuda:{torch.cuda.device_count()}", backend=backend)
    z = zk.noise(8, seed=1, stream=2, device="cuda", backend=backend)
    assert_same_bits(z.cpu(), zk.noise(8, seed=1, stream=2))


def test_a_launch_error_is_an_exception():
    """In a process of its own: an address fault leaves its CUDA context unusable."""
    if extension()[0] is None or not extension()[0].cuda:
        pytest.skip("built without CUDA")
    script = """
import torch
from zorba_kernels.build import extension
torch.ones(1, device="cuda")
compiled = extension()[0]
try:
    compiled.cuda_noise(0, 0, 1 << 20, 1 << 20, 0, 1, 2, 0, 0, 0)  # nobody's memory
    torch.cuda.synchronize()
except RuntimeError as error:
    print("fault:", str(error).splitlines()[0])
try:
    compiled.cuda_noise(0, 0, 1 << 20, 1 << 20, 0, 1, 2, 0, 0, 0)
except RuntimeError as error:
    print("launch:", error)
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["fault", "launch", "alive"], done
    assert lines[1].startswith("launch: CUDA: ")
