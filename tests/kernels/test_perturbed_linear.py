"""Noise in the outputs of layers equals layers of perturbed weights, row by row of a batch."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

import zorba_kernels as zk
from tests.kernels.bits import assert_same_bits
from tests.tolerances import bound

SHAPES = [(5, 3, 70, 33), (4, 1, 1, 1), (3, 17, 130, 192), (2, 4, 1100, 1030), (1, 1, 7, 2)]


def rows_of(rng, rows):
    """Samples, of which neighbours share some, and scales, one of them 0."""
    samples = torch.tensor([*rng.integers(rows, bits=31)])
    samples[rows // 2 :] = samples[rows // 2]
    scale = torch.randn(rows, generator=rng.generator)
    scale[rows - 1] = 0.0 if rows > 1 else 0.5
    return samples, scale


def normals(rng, shape, dtype):
    return torch.randn(shape, generator=rng.generator).to(dtype)


def assert_near(actual, exact, size):
    name = str(actual.dtype).removeprefix("torch.")
    assert float((actual.double() - exact).abs().max()) <= bound(f"perturbed linear {name}") * size


def noises(shape, samples, seed, stream):
    call = {"seed": seed, "stream": stream, "distribution": "rank1"}
    return [zk.noise(shape, sample=s, **call, backend="reference") for s in samples.tolist()]


@pytest.mark.covering(shape=SHAPES, bias=[False, True])
def test_linear(server, rng, dtype, shape, bias):
    rows, tokens, n, m = shape
    x, weight = normals(rng, (rows, tokens, n), dtype), normals(rng, (m, n), dtype)
    b = normals(rng, (m,), dtype) if bias else None
    samples, scale = rows_of(rng, rows)
    key = {"seed": rng.integer(64), "stream": rng.integer(64)}
    y = zk.perturbed_linear(x, weight, b, samples=samples, scale=scale, **key)
    for r, z in enumerate(noises((m, n), samples, **key)):
        # In float64: what both approximate.
        exact = linear(x[r].double(), weight.double() + scale[r].double() * z.double())
        exact = exact if b is None else exact + b.double()
        plain = linear(x[r], weight, b).double()
        size = float(exact.abs().max() + plain.abs().max())
        assert_near(y[r], exact, size)
        if scale[r] == 0:
            assert_same_bits(y[r], linear(x, weight, b)[r])


@pytest.mark.covering(rows=[1, 4], size=[1, 63, 1000, 4097])
def test_vector(server, rng, dtype, rows, size):
    """A vector's noise has no sum in it: its bits are those of a pass over its weights."""
    vector = rng.weights((size,), dtype)
    samples, scale = rows_of(rng, rows)
    seed, name = rng.integer(64), "norm.weight"
    stream = zk.noise.stream_of(name)
    y = zk.perturbed_vector(vector, seed=seed, stream=stream, samples=samples, scale=scale)
    for r in range(rows):
        copy = vector.clone()
        table = zk.ParamTable({name: copy})
        zk.add_noise_(
            table, seed, scale[r : r + 1], "rank1", samples=int(samples[r]), backend="reference"
        )
        assert_same_bits(y[r], copy)


def test_transposed_weights(server, rng, dtype):
    """Those of GPT-2's Conv1D are [n, m]: x meets the signs of rows."""
    x, (samples, scale) = normals(rng, (3, 5, 20), dtype), rows_of(rng, 3)
    key = {"seed": rng.integer(64), "stream": rng.integer(64)}
    y = torch.zeros(3, 5, 31, dtype=dtype)
    zk.perturb_(y, x, **key, samples=samples, scale=scale, transposed=True)
    for r, z in enumerate(noises((20, 31), samples, **key)):
        exact = x[r].double() @ z.double() * float(scale[r])
        size = float(exact.abs().max()) + float(x[r].abs().sum())
        assert_near(y[r], exact, size)


def test_outputs_that_are_not_contiguous(server, rng):
    x, (samples, scale) = rng.coefs(4, 6, 8), rows_of(rng, 4)
    call = {"seed": 3, "stream": 4, "samples": samples, "scale": scale}
    y = torch.zeros(4, 6, 5)
    zk.perturb_(y, x, **call)
    room = torch.zeros(4, 6, 10)
    zk.perturb_(room[..., ::2], x.transpose(0, 1).contiguous().transpose(0, 1), **call)
    assert_same_bits(room[..., ::2].contiguous(), y)
    assert not room[..., 1::2].any()


@pytest.mark.usefixtures("threads")
def test_threads_do_not_change_the_bits(compiled, rng):
    x, (samples, scale) = rng.coefs(40, 9, 70), rows_of(rng, 40)
    seen = []
    for count in (1, 2, 7):
        y = torch.zeros(40, 9, 50)
        torch.set_num_threads(count)
        zk.perturb_(y, x, seed=1, stream=2, samples=samples, scale=scale)
        seen.append(y)
    assert_same_bits(seen[1], seen[0])
    assert_same_bits(seen[2], seen[0])


GOOD = {"seed": 1, "stream": 2, "samples": torch.zeros(2, dtype=torch.int64)}
GOOD |= {"scale": torch.ones(2)}


@pytest.mark.parametrize(
    ("y", "x", "changed", "error", "message"),
    [
        (torch.zeros(2, 3).double(), None, {}, TypeError, "float64"),
        (torch.zeros(2, 3), None, {"samples": torch.zeros(2)}, TypeError, "torch.int64"),
        (torch.zeros(2, 3), None, {"scale": torch.zeros(2).half()}, TypeError, "float16"),
        (torch.zeros(3, 3), None, {}, ValueError, r"\(3, 3\), \(2,\)"),
        (torch.zeros(2), None, {}, ValueError, r"\[rows, ..., m\]"),
        (torch.zeros(2, 3), torch.zeros(3, 3), {}, ValueError, "last dimension"),
        (torch.zeros(2, 3), None, {"seed": -1}, ValueError, "seed"),
        (torch.zeros(2, 3), None, {"stream": 1 << 64}, ValueError, "stream"),
    ],
)
def test_bad_arguments(y, x, changed, error, message):
    before = y.clone()
    with pytest.raises(error, match=message):
        zk.perturb_(y, x, **(GOOD | changed))
    assert torch.equal(y, before)


def test_there_is_no_gradient():
    x = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="no_grad"):
        zk.perturbed_linear(x, torch.zeros(4, 3), **GOOD)


def test_compiled_graphs_hold_the_operator(rng):
    x, weight = rng.coefs(2, 3, 8), rng.coefs(5, 8)
    expected = zk.perturbed_linear(x, weight, **GOOD)
    compiled = torch.compile(zk.perturbed_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, **GOOD), expected)


def test_opcheck():
    words = torch.tensor([1]), torch.tensor([2])
    given = (torch.zeros(2, 3, 4), torch.ones(2, 3, 5), *words, GOOD["samples"], GOOD["scale"])
    torch.library.opcheck(torch.ops.zorba_kernels.perturb_, (*given, False, None))
