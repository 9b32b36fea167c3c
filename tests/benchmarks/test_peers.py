"""Peers do what their papers define, on a tiny random Llama, and their passes what is measured."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zorba_kernels as zk
from benchmarks.peers import mezo
from benchmarks.peers.decomfl import DeComFL
from benchmarks.peers.fedavg_lora import FedAvgLora
from benchmarks.peers.fedkseed import FedKSeed
from benchmarks.peers.method import Message, Method, Work
from tests.hf.tiny import build, case_of
from tests.tolerances import assert_normal, bound, sampling_error

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"ada": 30, "bob": 10, "cleo": 60}
EPS, LR = 1e-2, 1e-3
Weights = dict[str, Tensor]  # float64


@pytest.fixture
def work_on(threads: None, generator: torch.Generator) -> Callable[[nn.Module], Work]:
    """Three clients of unequal size, each with batches of its own, on a model."""
    torch.set_num_threads(1)
    base = int(torch.randint(1 << 30, (), generator=generator))

    def batch(client: str, round_: int, step: int) -> Tensor:
        seed = base + 10_000 * list(SIZES).index(client) + 100 * round_ + step
        own = torch.Generator().manual_seed(seed)
        return torch.randint(3, 100, (4, 7), generator=own)

    return lambda model: Work(
        model, lambda ids: model(input_ids=ids, labels=ids).loss, batch, SIZES
    )


@pytest.fixture
def work(work_on) -> Work:
    return work_on(build(case_of("llama")))


def run_round(method: Method, round_: int, clients: list[str] | None = None) -> dict[str, Message]:
    down = method.begin(round_, clients or list(SIZES))
    up = {client: method.local(client, round_, message) for client, message in down.items()}
    method.aggregate(round_, up)
    return up


def weights_of(model: nn.Module) -> Weights:
    return {name: p.detach().double().clone() for name, p in model.named_parameters()}


def noise_of(model: nn.Module, seed: int, sample: int = 0) -> Weights:
    """The direction of a seed, made apart from the kernels that the peers call."""
    key = {"seed": seed, "sample": sample, "backend": "reference"}
    return {
        name: zk.noise(p.shape, stream=zk.noise.stream_of(name), **key).double()
        for name, p in model.named_parameters()
    }


def plus(weights: Weights, *terms: tuple[float, Weights]) -> Weights:
    return {
        name: value + sum(coef * direction[name] for coef, direction in terms)
        for name, value in weights.items()
    }


@torch.no_grad()
def loss_at(model: nn.Module, weights: Weights, ids: Tensor) -> float:
    floats = {name: value.float() for name, value in weights.items()}
    inputs = {"input_ids": ids, "labels": ids}
    return float(torch.func.functional_call(model, floats, kwargs=inputs).loss)


def assert_central(model: nn.Module, weights: Weights, ids: Tensor, z: Weights, measured: float):
    ahead, behind = (loss_at(model, plus(weights, (eps, z)), ids) for eps in (EPS, -EPS))
    assert_scalar(measured, (ahead - behind) / (2 * EPS))


def assert_near(model: nn.Module, wanted: Weights) -> None:
    for name, value in weights_of(model).items():
        assert float((value - wanted[name]).abs().max()) <= bound("perturbed in place"), name


def assert_scalar(measured: float, wanted: float) -> None:
    assert abs(measured - wanted) <= bound("difference of losses") * (1 + abs(wanted))


def after_step(weights: Weights, directions: list[Weights], scalars: np.ndarray) -> Weights:
    """DeComFL's step along the mean of some directions, each times its scalar."""
    shares = [-LR * float(g) / len(scalars) for g in scalars]
    return plus(weights, *zip(shares, directions, strict=True))


def test_decomfl_measures_forward_differences_along_its_local_path(work: Work) -> None:
    steps, perturbations, model = 2, 3, work.model
    method = DeComFL(work, LR, EPS, steps, perturbations, seed=5)
    start = weights_of(model)
    message = method.begin(1, ["bob"])["bob"]
    scalars = method.local("bob", 1, message).content
    assert scalars.shape == (steps, perturbations)
    assert_near(model, start)
    local = start
    for k, seed in enumerate(message.content.seeds):
        batch = work.batch("bob", 1, k)
        base = loss_at(model, local, batch)
        directions = [noise_of(model, seed, p) for p in range(perturbations)]
        for p, z in enumerate(directions):
            ahead = loss_at(model, plus(local, (EPS, z)), batch)
            assert_scalar(scalars[k, p], (ahead - base) / EPS)
        local = after_step(local, directions, scalars[k])


def test_decomfl_rebuilds_the_model_from_seeds_and_mean_scalars(work_on, work: Work) -> None:
    """Of two clients; the third and a late replica get what they lack."""
    steps, perturbations, model = 2, 2, work.model
    start, untouched = weights_of(model), copy.deepcopy(model)
    method = DeComFL(work, LR, EPS, steps, perturbations)
    seeds, scalar_bytes = 8 * steps, 4 * steps * perturbations
    assert method.begin(1, ["ada"])["ada"].numbers == seeds
    wanted = start
    for round_ in (1, 2, 3):
        up = run_round(method, round_, ["ada", "bob"])
        assert up["ada"].numbers == up["ada"].encoded == scalar_bytes
        entry = method.history[-1]
        mean = np.mean([up[c].content for c in up], axis=0)  # every client weighs the same
        np.testing.assert_allclose(entry.scalars, mean, rtol=1e-6)
        for seed, scalars in zip(entry.seeds, entry.scalars, strict=True):
            directions = [noise_of(model, seed, p) for p in range(perturbations)]
            wanted = after_step(wanted, directions, scalars)
    assert any(not torch.equal(start[name], wanted[name]) for name in start)
    assert_near(model, wanted)
    down = method.begin(4, list(SIZES))
    assert down["ada"].numbers == seeds + (seeds + scalar_bytes)
    assert down["cleo"].numbers == seeds + 3 * (seeds + scalar_bytes)

    late = DeComFL(work_on(untouched), LR, EPS, steps, perturbations)
    late.apply(0, method.history[:1])
    late.apply(0, method.history)  # what it has is not applied again
    assert_near(untouched, wanted)
    with pytest.raises(ValueError, match="round 0"):
        DeComFL(work, LR).apply(1, method.history[1:])


def test_fedkseed_accumulates_central_differences_of_a_pool(work: Work) -> None:
    steps, model = 3, work.model
    method = FedKSeed(work, LR, EPS, pool=4, local_steps=steps, seed=7)
    assert len(set(method.seeds)) == 4
    start = weights_of(model)
    wanted = np.zeros(4)
    for round_ in (1, 2):
        before = weights_of(model)
        for client, reply in run_round(method, round_).items():
            assert len(reply.content) == steps
            local = before
            for k, (j, scalar) in enumerate(reply.content):
                z = noise_of(model, method.seeds[j])
                assert_central(model, local, work.batch(client, round_, k), z, scalar)
                local = plus(local, (-LR * scalar, z))
                wanted[j] += scalar * SIZES[client] / sum(SIZES.values())
    np.testing.assert_allclose(method.accumulated, wanted, rtol=1e-12)
    directions = [noise_of(model, seed) for seed in method.seeds]
    assert_near(model, plus(start, *zip(-LR * wanted, directions, strict=True)))


def test_fedkseed_takes_the_bytes_of_its_paper(work: Work) -> None:
    """4,096 seeds and 200 local steps: under 18 kB a client and round."""
    method = FedKSeed(work, LR, pool=4096)
    assert method.begin(1, ["ada"])["ada"].numbers == 16_388
    assert run_round(method, 1)["ada"].numbers * 200 == 1_600


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fedavg_trains_adapters_with_adamw_and_takes_their_weighted_mean(
    work: Work, checkpointing: bool
) -> None:
    lr, steps = 1e-2, 2
    options = {"rank": 2, "alpha": 4, "dropout": 0.0, "checkpointing": checkpointing}
    method = FedAvgLora(work, lr, steps, **options)
    named = dict(method.model.named_parameters())
    base = {n: p.detach().clone() for n, p in named.items() if "lora" not in n}
    trained = {n.replace(".default", ""): p for n, p in named.items() if "lora" in n}
    assert len(trained) == 3 * 4 * 2  # blocks, projections, both factors
    start = {n: v.clone() for n, v in method.adapter.items()}
    up = run_round(method, 1)
    size = sum(p.nbytes for p in trained.values())
    assert method.begin(2, ["ada"])["ada"].numbers == up["ada"].numbers == size
    for name, mean in method.adapter.items():
        wanted = sum(up[c].content[name].double() * SIZES[c] for c in SIZES) / sum(SIZES.values())
        torch.testing.assert_close(mean.double(), wanted, rtol=1e-6, atol=1e-8)
        assert torch.equal(trained[name], mean), name
    assert all(torch.equal(named[name], value) for name, value in base.items())

    # The same steps on the same batches, by hand.
    for name, p in trained.items():
        p.data.copy_(start[name])
    optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        work.loss(work.batch("cleo", 1, step)).backward()
        optimizer.step()
    for name, p in trained.items():
        torch.testing.assert_close(p.detach(), up["cleo"].content[name], rtol=1e-5, atol=1e-7)


def test_mezo_steps_along_its_noise(work: Work) -> None:
    """Algorithm 1 of the paper: ``w - lr g z``, g a central difference."""
    model, batch = work.model, work.batch("ada", 1, 0)
    start = weights_of(model)
    plus_loss = mezo.step(list(model.parameters()), lambda: work.loss(batch), 11, EPS, LR)
    torch.manual_seed(11)
    z = {name: torch.normal(0.0, 1.0, p.shape).double() for name, p in model.named_parameters()}
    ahead = loss_at(model, plus(start, (EPS, z)), batch)
    assert abs(plus_loss - ahead) <= bound("difference of losses") * EPS
    end = weights_of(model)
    along = sum(float(((end[n] - start[n]) * z[n]).sum()) for n in z)
    scalar = -along / LR / sum(float((v**2).sum()) for v in z.values())
    assert_central(model, start, batch, z, scalar)
    assert_near(model, plus(start, (-LR * scalar, z)))


# --- Passes over the weights ----------------------------------------------------------------------

COUNT = 40_000


def test_mezo_compiled():
    """The seed gives the noise back, so that a pass of the opposite sign takes it off."""
    parameters = [torch.nn.Parameter(torch.zeros(COUNT), requires_grad=False) for _ in range(2)]
    mezo.perturb_compiled(parameters, 1, 1.0, 0.5, backend="eager")
    first, second = (p.detach().clone() / 0.5 for p in parameters)
    for z in (first, second):
        assert_normal(z)
    assert abs(float((first * second).mean())) < sampling_error(COUNT)
    mezo.perturb_compiled(parameters, 1, -1.0, 0.5, backend="eager")
    assert all(float(p.abs().max()) == 0.0 for p in parameters)


RANDN = f"""
import torch
from benchmarks.peers import tl_randn
from tests.tolerances import assert_normal
weights = [torch.ones({COUNT} + extra) for extra in (0, 7)]
tl_randn.perturb(weights, 1, 0.5)
for w in weights:
    assert_normal((w - 1) / 0.5)
assert not torch.equal(weights[0], weights[1][:{COUNT}])
"""


def test_tl_randn():
    """In Triton's interpreter, which a process has to ask for before it imports Triton."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", RANDN], cwd=ROOT, env=environment, check=True)
