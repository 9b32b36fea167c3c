"""Noise in the forward: weights that are tied or of 16 bits, memory that runs out, many steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zorba import ZerothOrderSGD

import zorba_kernels as zk
from tests.optim.models import same_bits, snapshot, untouched
from tests.optim.test_fused import EXAMPLES, model_of, task
from tests.tolerances import bound


class Twice(nn.Module):
    """A layer that is called twice, one that is tied to it, and two kinds of norms."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twin = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.twin.weight = self.first.weight
        self.norm, self.scale = nn.LayerNorm(8), Scale()
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(torch.tanh(self.first(torch.tanh(self.first(x)))))
        return self.last(self.scale(torch.tanh(self.twin(x))))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * self.weight


def of_examples(model, generator, tokens=5):
    x = torch.randn(EXAMPLES, tokens, 8, generator=generator)
    dtype = next(model.parameters()).dtype
    return x, lambda batch=x: model(batch.to(dtype)).float().square().mean((1, 2))


@pytest.mark.parametrize("count", [1, 3])
def test_tied_weights_and_layers_called_twice(count, generator):
    found = []
    for placement in ("fused", "scratch"):
        model = Twice()
        _, losses = of_examples(model, generator.manual_seed(1))
        options = {"num_perturbations": count, "distribution": "rank1", "momentum": 0.5}
        optimizer = ZerothOrderSGD(
            model, 1e-2, eps=1e-2, placement=placement, directions="own",
            examples_per_direction=3, **options,
        )  # fmt: skip
        for _ in range(3):
            optimizer.step(losses)
            found.append(optimizer.last_step.scalars)
        assert model.twin.weight is model.first.weight
    for mine, theirs in zip(found[:3], found[3:], strict=True):
        assert_close_scalars(mine, theirs)


def assert_close_scalars(mine, theirs, tolerance="fused scalar"):
    assert len(mine) == len(theirs)
    largest = max(map(abs, theirs))
    assert largest > 0
    assert all(abs(g - h) <= bound(tolerance) * largest for g, h in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_16_bit_weights(kind, dtype):
    """Scalars are those of the same weights in float32; so far apart, rounding is the smaller."""
    found = []
    for kept in (torch.float32, dtype):
        model = model_of(kind).to(dtype).to(kept)
        ids, losses = task(model)
        optimizer = ZerothOrderSGD(
            model, 0.0, eps=0.1, placement="fused", directions="own", examples_per_direction=3
        )
        optimizer.step(lambda batch, losses=losses: losses(batch).float(), ids)
        found.append(optimizer.last_step.scalars)
    assert_close_scalars(found[1], found[0], "fused scalar in 16 bits")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_batch", [False, True], ids=["two calls", "one batch"])
def test_many_steps_without_a_rate_keep_every_bit(dtype, with_batch, full, generator):
    """Zeros with a sign and subnormal numbers are among them."""
    model = Twice().to(dtype)
    model.last.weight.data[0, :3] = torch.tensor([-0.0, 1e-40, -1e-40])
    before = snapshot(model)
    x, losses = of_examples(model, generator, tokens=2)
    options = {"directions": "own", "examples_per_direction": 2, "momentum": 0.5}
    optimizer = ZerothOrderSGD(
        model, 0.0, eps=1e-2, placement="fused", rounding="nearest", **options
    )
    seen = set()
    for _ in range(10_000 if full else 300):
        optimizer.step(losses, *([x] if with_batch else []))
        seen.add(optimizer.last_step.loss)
    assert same_bits(model, before)
    assert len(seen) > 100, "the losses never saw a perturbation"


@pytest.mark.parametrize("at", [1, 2])
def test_memory_that_runs_out_in_one_batch_of_both_signs(at, generator):
    """Two calls of half as many rows follow, once and for all, with the same directions."""
    model = Twice()
    x, losses = of_examples(model, generator)
    before, rows = snapshot(model), []

    def small(batch):
        rows.append(len(batch))
        found = losses(batch)
        if len(batch) > EXAMPLES or len(rows) == at:
            raise torch.OutOfMemoryError
        return found

    options = {"directions": "own", "examples_per_direction": 3, "placement": "fused"}
    optimizer = ZerothOrderSGD(model, 0.0, eps=1e-2, **options)
    if at == 2:
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step(small, x)
        assert optimizer.param_groups[0]["step"] == 0
        assert same_bits(model, before)
    for _ in range(2):
        optimizer.step(small, x)
        rows.append(None)
    assert rows == [2 * EXAMPLES, *[EXAMPLES] * (3 if at == 2 else 2), None, *[EXAMPLES] * 2, None]
    assert same_bits(model, before)
    assert untouched(model)
    other = ZerothOrderSGD(model, 0.0, eps=1e-2, **options)
    other.step(losses)
    other.step(losses)
    assert optimizer.last_step.scalars == other.last_step.scalars


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.5}, {"clip": 0.1, "num_perturbations": 2}, {"normalize": True}],
    ids=str,
)
def test_every_backend_writes_the_update(dtype, options, generator):
    """From what a recorder gets, on the weights of the beginning: equal fingerprints."""
    model = Twice().to(dtype)
    x, losses = of_examples(model, generator)
    start, updates = snapshot(model), []

    class Recorder:
        def append(self, step, *update):
            updates.append(update)

    optimizer = ZerothOrderSGD(
        model, 0.1, eps=1e-2, placement="fused", directions="own", examples_per_direction=3,
        weight_decay=0.1, **options,
    )  # fmt: skip
    optimizer.recorder = Recorder()
    for _ in range(3):
        optimizer.step(losses, x)
    trained = zk.fingerprint(optimizer.placement.table)
    assert len(updates) == 3
    served = [status.name for status in zk.backends("cpu") if status.available]
    assert {"reference", "cpu"} <= set(served)
    for backend in served:
        table = optimizer.placement.table.with_tensors(
            {name: start[name].clone() for name in optimizer.placement.table.names}
        )
        assert zk.fingerprint(table) != trained
        for terms, rounding_seed, decay in updates:
            table.run(
                zk.Program(
                    terms.seeds, terms.coefs, "rank1", "stochastic", rounding_seed,
                    samples=terms.samples, decay=decay, backend=backend,
                )
            )  # fmt: skip
        assert zk.fingerprint(table, backend=backend) == trained
