"""The GPU backends against the CPU, on a GPU. No figure or result from one is recorded yet."""

from __future__ import annotations

import pytest
import torch

import zorba_kernels as zk
from tests.kernels.bits import assert_same_bits
from zorba_kernels.backends import cuda, triton, triton_tuning

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 7, 511, 512, 1023, 4096, 4097, 9001, 100_003)


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    """The name of each GPU backend in turn."""
    module = {"cuda": cuda, "triton": triton}[request.param]
    reason = module.unavailable(torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    return request.param


def compare(backend, weights, *args, groups=None, offsets=None, **kwargs):
    """In place on the GPU and out of place on the GPU against the best CPU backend."""
    expected = {n: w.clone() for n, w in weights.items()}
    zk.add_noise_(zk.ParamTable(expected, groups=groups, offsets=offsets), *args, **kwargs)
    device = {n: w.cuda() for n, w in weights.items()}
    table = zk.ParamTable(device, groups=groups, offsets=offsets)
    results = {n: torch.full_like(w, torch.nan) for n, w in device.items()}
    out = zk.ParamTable(results, groups=groups, offsets=offsets)
    zk.add_noise(table, out, *args, backend=backend, **kwargs)
    zk.add_noise_(table, *args, backend=backend, **kwargs)
    for name, tensor in expected.items():
        assert_same_bits(results[name].cpu(), tensor)
        assert_same_bits(device[name].cpu(), tensor)


@pytest.mark.covering(size=SIZES)
def test_noise(backend, rng, distribution, size):
    for offset in (0, 3, 4095, (1 << 35) - size):
        call = {
            "seed": rng.integer(64),
            "stream": rng.integer(64),
            "sample": rng.integer(31),
            "distribution": distribution,
            "offset": offset,
        }
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
    coefs = torch.as_tensor(rng.coefs(3 * 9)).reshape(3, 9).clone()
    coefs[1, 3:] = 0
    compare(
        backend, weights, rng.integers(9), coefs, distribution, rounding, rng.integers(3),
        rounds=[2, 0, 7], decay=[[0.0] * 3, [0.01, 0.0, 0.0], [0.0, 0.5, 0.1]], groups=groups,
    )  # fmt: skip


def test_misaligned(backend, rng, dtype, rounding):
    base = rng.weights(10_000, dtype).cuda()
    for shift in (1, 3, 8):
        view, cpu = base[shift:].clone(), base[shift:].cpu()
        padded = torch.cat([base[:shift], view])
        zk.add_noise_(
            zk.ParamTable({"w": padded[shift:]}), 1, 1e-3, rounding=rounding, backend=backend
        )
        zk.add_noise_(zk.ParamTable({"w": cpu}), 1, 1e-3, rounding=rounding)
        assert_same_bits(padded[shift:].cpu(), cpu)
        assert_same_bits(padded[:shift], base[:shift])


def test_special_values(backend, rng, dtype, rounding):
    info = torch.finfo(dtype)
    values = [torch.inf, -torch.inf, torch.nan, info.max, info.min, info.tiny, 0.0, -0.0]
    weights = rng.weights(8192, dtype)
    weights[100:4100:40] = torch.tensor(values * 13, dtype=dtype)[:100]
    for coef in (1e-3, 3e38):
        compare(backend, {"w": weights}, 1, coef, rounding=rounding)


def test_fingerprint(backend, rng):
    weights = {f"{i}": rng.weights(n, DTYPES[i % 3]) for i, n in enumerate([0, 1, 5, 4097, 70_001])}
    table = zk.ParamTable({n: w.cuda() for n, w in weights.items()})
    assert zk.fingerprint(table, backend=backend) == zk.fingerprint(zk.ParamTable(weights))
    shifted = zk.ParamTable({"w": weights["4"].cuda()[1:]})
    expected = zk.fingerprint(zk.ParamTable({"w": weights["4"][1:]}))
    assert zk.fingerprint(shifted, backend=backend) == expected


def test_another_stream(backend, rng):
    weights = rng.weights(1 << 20, torch.bfloat16)
    mine = weights.cuda()
    table = zk.ParamTable({"w": mine})
    zk.add_noise_(table, 1, 0.0, backend=backend)  # the table is copied on the first stream
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for seed in range(20):
            zk.add_noise_(table, [seed, seed + 1], [1e-3] * 2, backend=backend)
    stream.synchronize()
    expected = zk.ParamTable({"w": weights})
    for seed in range(20):
        zk.add_noise_(expected, [seed, seed + 1], [1e-3] * 2)
    assert_same_bits(mine.cpu(), weights)


def test_graph_with_seeds_on_the_device(backend, rng):
    """A captured program reads its seeds and coefficients when it is replayed."""
    weights = rng.weights(100_000, torch.bfloat16)
    mine = weights.cuda()
    table = zk.ParamTable({"w": mine})
    program = zk.Program([1, 2], [0.0, 0.0], rounding="stochastic", rounding_seed=3)
    on_device = {"cuda": cuda, "triton": triton}[backend].DeviceProgram(program, table)
    on_device.run(table, table)  # coefficients of 0: only warms up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        on_device.run(table, table)
    assert_same_bits(mine.cpu(), weights)
    expected = zk.ParamTable({"w": weights})
    for step in range(3):
        on_device.arrays["seeds"].copy_(torch.tensor([10 + step, 20 + step]))
        on_device.arrays["rounding_seeds"].fill_(step)
        on_device.arrays["coefs"].fill_(1e-3)
        graph.replay()
        zk.add_noise_(
            expected, [10 + step, 20 + step], [1e-3] * 2, rounding="stochastic", rounding_seed=step
        )
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
