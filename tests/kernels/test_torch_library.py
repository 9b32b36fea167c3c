"""The operations as torch operators: schemas, fake kernels, and functions under torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import zorba_kernels as zk
from tests.kernels.bits import assert_same_bits, changed

operators = torch.ops.zorba_kernels


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_and_table(rng, device, dtype=torch.float32):
    torch.manual_seed(rng.seed)
    layers = torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.Tanh(), torch.nn.Linear(24, 2))
    model = layers.to(device=device, dtype=dtype)
    return model, zk.ParamTable(model.named_parameters(), groups={"2.weight": 1, "2.bias": 1})


class Twins:
    def __init__(self, rng, device, dtype=torch.float32):
        self.mine, self.table = model_and_table(rng, device, dtype)
        self.theirs, self.their_table = model_and_table(rng, device, dtype)

    def assert_equal(self):
        assert_same_bits(dict(self.mine.named_parameters()), dict(self.theirs.named_parameters()))


def difference(model, table, x, seed, eps):
    zk.add_noise_(table, seed, eps)
    plus = model(x)
    zk.add_noise_(table, seed, -2 * eps)
    minus = model(x)
    zk.add_noise_(table, [seed, seed], [[eps, 1e-3], [eps, 0.0]], rounds=[1, 1])
    return plus - minus


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_serves_every_seed(rng, device, backend):
    """And functionalisation brings the change back to the weights themselves."""
    twins, counter = Twins(rng, device), CompileCounterWithBackend(backend)
    compiled = torch.compile(difference, fullgraph=True, backend=counter)
    addresses = [p.data_ptr() for p in twins.mine.parameters()]
    x = torch.randn(3, 24, device=device)
    for seed in [1, *rng.integers(6, bits=62)]:
        out = compiled(twins.mine, twins.table, x, seed, 1e-2)
        expected = difference(twins.theirs, twins.their_table, x, seed, 1e-2)
        # Inductor may compute the model's products in another order.
        if backend == "aot_eager":
            assert_same_bits(out, expected)
        twins.assert_equal()
    assert [p.data_ptr() for p in twins.mine.parameters()] == addresses
    assert counter.frame_count <= 2, "the first seed, and any seed: no graph a seed"


@torch.no_grad()
def test_seeds_and_coefficients_in_tensors(rng, device):
    """No new graph for seeds and coefficients that change from step to step, up to 2**64 - 1."""
    twins, counter = Twins(rng, device, torch.bfloat16), CompileCounterWithBackend("aot_eager")
    how = ("rademacher", "stochastic")

    def step(seeds, coefs, decay):
        zk.add_noise_(twins.table, seeds, coefs, *how, rounding_seed=seeds[:1], decay=decay)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for seeds in ([3, (1 << 64) - 1], [0, 1 << 63], rng.integers(2)):
        coefs = rng.coefs(2)
        bits = torch.tensor([s - (1 << 64) if s >> 63 else s for s in seeds])
        compiled(bits, coefs, torch.tensor(0.01))
        zk.add_noise_(twins.their_table, seeds, coefs, *how, seeds[0], decay=0.01)
        twins.assert_equal()
    assert counter.frame_count == 1


@torch.no_grad()
def test_out_of_place_and_samples(rng, device, dtype):
    source = {"w": rng.weights((5, 13), dtype).to(device)}
    results = {"w": torch.full_like(source["w"], torch.nan)}
    table, out = zk.ParamTable(source), zk.ParamTable(results)
    before = source["w"].clone()

    def make(seed):
        zk.add_noise(table, out, [seed, seed], [1e-2, 1e-3], samples=[7, 8])
        return results["w"] * 2

    twice = torch.compile(make, fullgraph=True, backend="aot_eager")(5)
    assert_same_bits(source["w"], before)
    expected = changed(source, [5, 5], [1e-2, 1e-3], samples=[7, 8])["w"]
    assert_same_bits(results["w"], expected)
    assert_same_bits(twice, expected * 2)


def test_noise_and_fingerprint(rng, device):
    stream = zk.noise.stream_of("w")
    _, table = model_and_table(rng, device)

    def make(count, seed):
        return zk.noise((count, 3), seed=seed, stream=stream, offset=5, device=device) + 0.0

    compiled = torch.compile(make, fullgraph=True, backend="aot_eager")
    for count, seed in ((4, 1), (9, 2), (11, rng.integer(62)), (2, (1 << 64) - 1)):
        assert_same_bits(compiled(count, seed), make(count, seed))
    hashed = torch.compile(lambda: zk.fingerprint(table), backend="aot_eager")
    assert hashed() == zk.fingerprint(table)


def test_a_bad_argument_is_refused_when_the_graph_runs(rng):
    _, table = model_and_table(rng, "cpu")
    before = zk.fingerprint(table)

    def step(coefs):
        zk.add_noise_(table, [1, 2], coefs)

    compiled = torch.compile(step, backend="aot_eager")
    with pytest.raises(ValueError, match="finite"):
        compiled(torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="coefs has shape"):
        compiled(torch.tensor([1.0]))
    assert zk.fingerprint(table) == before


# --- torch's own checks of an operator ------------------------------------------------------------


def arguments(rng, device, dtype):
    tensors = [rng.weights(n, dtype).to(device) for n in (1000, 63)]
    layout = (["a", "b"], [0, 1], [0, 8], [0, 0], 2)
    program = {
        "seeds": torch.tensor([1, -1]),
        "coefs": torch.tensor([[0.5, 0.25], [0.0, 1.0]]),
        "rounding": "stochastic",
        "rounding_seed": torch.tensor([4]),
        "samples": torch.tensor([0, 3]),
        "rounds": torch.tensor([2]),
        "decay": torch.tensor(0.1),
    }
    return tensors, layout, program


def test_opcheck(rng, device, dtype):
    tensors, layout, program = arguments(rng, device, dtype)
    out = [torch.empty_like(t) for t in tensors]
    torch.library.opcheck(operators.add_noise_.default, (tensors, *layout), program)
    torch.library.opcheck(operators.add_noise.default, (tensors, out, *layout), program)
    torch.library.opcheck(operators.fingerprint.default, (tensors, *layout, None))
    word = torch.tensor([-5])
    call = ((3, 5), word, word, 2, "rademacher", torch.device(device), 17, None)
    torch.library.opcheck(operators.noise.default, call)


def test_operators_find_the_table_of_their_tensors(rng):
    """A table that is alive is used again; one that is gone leaves nothing behind."""
    tensors, layout, program = arguments(rng, "cpu", torch.float32)
    from zorba_kernels.table import _alive, find_table

    named, places = dict(zip("ab", tensors, strict=True)), ({"a": 0, "b": 1}, {"b": 8})
    table = zk.ParamTable(named, *places)
    assert find_table(tensors, *layout) is table
    other = (layout[0], [0, 0], *layout[2:])
    assert find_table(tensors, *other) is not table
    expected = changed(
        named, [1, (1 << 64) - 1], [[0.5, 0.25], [0.0, 1.0]], "gaussian", "stochastic", 4,
        samples=[0, 3], rounds=[2], decay=0.1, groups=places[0], offsets=places[1],
    )  # fmt: skip
    operators.add_noise_(tensors, *layout, **program)
    assert_same_bits(named, expected)
    known = len(_alive)
    del table
    assert len(_alive) == known - 1
