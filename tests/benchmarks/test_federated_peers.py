"""The federated baselines do what their papers define, on a tiny random Llama."""

from __future__ import annotations

import copy
from typing import Any

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
from tests.tolerances import bound

SIZES = {"ada": 30, "bob": 10, "cleo": 60}
EPS = 1e-2


@pytest.fixture
def model(threads: None) -> nn.Module:
    """A Llama of 3 blocks, float32."""
    torch.set_num_threads(1)
    return build(case_of("llama"))


@pytest.fixture
def work(model: nn.Module, generator: torch.Generator) -> Work:
    """Three clients of unequal size, each with batches of its own."""
    base = int(torch.randint(1 << 30, (), generator=generator))

    def batch(client: str, round_: int, step: int) -> Tensor:
        seed = base + 10_000 * list(SIZES).index(client) + 100 * round_ + step
        own = torch.Generator().manual_seed(seed)
        return torch.randint(3, 100, (4, 7), generator=own)

    def loss(ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

    return Work(model, loss, batch, SIZES)


def run_round(method: Method, round_: int, clients: list[str] | None = None) -> dict[str, Message]:
    """One round; returns the clients' answers."""
    down = method.begin(round_, clients or list(SIZES))
    up = {client: method.local(client, round_, message) for client, message in down.items()}
    method.aggregate(round_, up)
    return up


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, float64."""
    return {name: p.detach().double().clone() for name, p in model.named_parameters()}


def noise_of(model: nn.Module, seed: int, sample: int = 0) -> dict[str, Tensor]:
    """The direction of a seed, float64, made apart from the kernels that the peers call."""
    return {
        name: zk.noise(
            p.shape, seed=seed, stream=zk.noise.stream_of(name), sample=sample, backend="reference"
        ).double()
        for name, p in model.named_parameters()
    }


def plus(weights: dict[str, Tensor], *terms: tuple[float, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Weights plus a linear combination of directions."""
    return {
        name: value + sum(coef * direction[name] for coef, direction in terms)
        for name, value in weights.items()
    }


def loss_at(model: nn.Module, work: Work, weights: dict[str, Tensor], batch: Any) -> float:
    """The loss at other weights; the model's own are put back."""
    own = weights_of(model)
    load(model, weights)
    with torch.no_grad():
        value = float(work.loss(batch))
    load(model, own)
    return value


def load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])


def assert_near(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        off = float((p.detach().double() - wanted[name]).abs().max())
        assert off <= bound("perturbed in place"), name


def assert_scalar(measured: float, wanted: float) -> None:
    assert abs(measured - wanted) <= bound("difference of losses") * (1 + abs(wanted))


# --- DeComFL -------------------------------------------------------------------------------------


def test_decomfl_measures_forward_differences_along_its_local_path(
    model: nn.Module, work: Work
) -> None:
    lr, steps, perturbations = 1e-3, 2, 3
    method = DeComFL(work, lr, EPS, steps, perturbations, seed=5)
    start = weights_of(model)
    message = method.begin(1, ["bob"])["bob"]
    scalars = method.local("bob", 1, message).content
    assert scalars.shape == (steps, perturbations)
    assert_near(model, start)
    local = start
    for k, seed in enumerate(message.content.seeds):
        batch = work.batch("bob", 1, k)
        base = loss_at(model, work, local, batch)
        directions = [noise_of(model, seed, p) for p in range(perturbations)]
        for p, z in enumerate(directions):
            moved = loss_at(model, work, plus(local, (EPS, z)), batch)
            assert_scalar(scalars[k, p], (moved - base) / EPS)
        shares = [-lr * float(g) / perturbations for g in scalars[k]]
        local = plus(local, *zip(shares, directions, strict=True))


def test_decomfl_rebuilds_the_model_from_seeds_and_mean_scalars(
    model: nn.Module, work: Work
) -> None:
    lr, steps, perturbations = 1e-3, 2, 2
    start, untouched = weights_of(model), copy.deepcopy(model)
    method = DeComFL(work, lr, EPS, steps, perturbations)
    wanted = start
    for round_ in (1, 2, 3):
        up = run_round(method, round_)
        mean = np.mean([up[c].content for c in SIZES], axis=0)  # every client weighs the same
        np.testing.assert_allclose(method.history[-1].scalars, mean, rtol=1e-6)
        for k, seed in enumerate(method.history[-1].seeds):
            directions = [noise_of(model, seed, p) for p in range(perturbations)]
            shares = [-lr * float(g) / perturbations for g in method.history[-1].scalars[k]]
            wanted = plus(wanted, *zip(shares, directions, strict=True))
    assert any(not torch.equal(start[name], wanted[name]) for name in start)
    assert_near(model, wanted)

    late = DeComFL(Work(untouched, work.loss, work.batch, SIZES), lr, EPS, steps, perturbations)
    late.apply(0, method.history[:1])
    late.apply(0, method.history)  # what it has is not applied again
    assert_near(untouched, wanted)
    other = DeComFL(Work(build(case_of("llama")), work.loss, work.batch, SIZES), lr)
    other.restore(method.state())
    assert weights_of(other.work.model).keys() == start.keys()
    assert_near(other.work.model, wanted)
    with pytest.raises(ValueError, match="round 0"):
        DeComFL(work, lr).apply(1, method.history[1:])


def test_decomfl_sends_what_a_client_lacks(work: Work) -> None:
    steps, perturbations = 2, 3
    method = DeComFL(work, 1e-3, EPS, steps, perturbations)
    seeds, round_bytes = 8 * steps, 8 * steps + 4 * steps * perturbations
    assert method.begin(1, ["ada"])["ada"].numbers == seeds
    for round_ in (1, 2, 3):
        up = run_round(method, round_, ["ada", "bob"])
        assert up["ada"].numbers == up["ada"].encoded == 4 * steps * perturbations
    down = method.begin(4, list(SIZES))
    assert down["ada"].numbers == seeds + round_bytes
    assert down["cleo"].numbers == seeds + 3 * round_bytes


# --- FedKSeed ------------------------------------------------------------------------------------


def test_fedkseed_accumulates_central_differences_of_a_pool(model: nn.Module, work: Work) -> None:
    lr, steps = 1e-3, 3
    method = FedKSeed(work, lr, EPS, pool=4, local_steps=steps, seed=7)
    assert len(set(method.pool)) == 4
    start = weights_of(model)
    wanted = np.zeros(4)
    for round_ in (1, 2):
        before = weights_of(model)
        up = run_round(method, round_)
        for client, reply in up.items():
            assert len(reply.content) == steps
            local = before
            for k, (j, scalar) in enumerate(reply.content):
                batch, z = work.batch(client, round_, k), noise_of(model, method.pool[j])
                ahead = loss_at(model, work, plus(local, (EPS, z)), batch)
                behind = loss_at(model, work, plus(local, (-EPS, z)), batch)
                assert_scalar(scalar, (ahead - behind) / (2 * EPS))
                local = plus(local, (-lr * scalar, z))
                wanted[j] += scalar * SIZES[client] / sum(SIZES.values())
    np.testing.assert_allclose(method.accumulated, wanted, rtol=1e-12)
    directions = [noise_of(model, seed) for seed in method.pool]
    assert_near(model, plus(start, *zip(-lr * wanted, directions, strict=True)))

    later = FedKSeed(
        Work(build(case_of("llama")), work.loss, work.batch, SIZES), lr, EPS, 4, seed=7
    )
    later.restore(method.state())
    assert_near(later.work.model, weights_of(model))


def test_fedkseed_takes_the_bytes_of_its_paper(work: Work) -> None:
    """4,096 seeds and 200 local steps: under 18 kB a client and round."""
    method = FedKSeed(work, 1e-3, pool=4096, local_steps=200)
    down = method.begin(1, ["ada"])["ada"].numbers
    method.local_steps = 1
    up = 200 * run_round(method, 1, ["ada"])["ada"].numbers
    assert (down, up, down + up) == (16_388, 1_600, 17_988)


# --- FedIT ---------------------------------------------------------------------------------------


def test_fedavg_trains_adapters_with_adamw_and_takes_their_weighted_mean(
    model: nn.Module, work: Work
) -> None:
    lr, steps = 1e-2, 2
    method = FedAvgLora(work, lr, steps, rank=2, alpha=4, dropout=0.0)
    base = {n: p.detach().clone() for n, p in method.model.named_parameters() if "lora" not in n}
    start = {n: v.clone() for n, v in method.adapter.items()}
    up = run_round(method, 1)
    trained = {n: p for n, p in method.model.named_parameters() if "lora" in n}
    assert len(trained) == 3 * 4 * 2  # blocks, projections, both factors
    for name, mean in method.adapter.items():
        parts = [up[c].content[name].double() * SIZES[c] for c in SIZES]
        wanted = sum(parts) / sum(SIZES.values())
        torch.testing.assert_close(mean.double(), wanted, rtol=1e-6, atol=1e-8)
    for name, p in method.model.named_parameters():
        held = base.get(name, method.adapter.get(name.replace(".default", "")))
        assert held is not None
        assert torch.equal(p, held), name

    # The same steps on the same batches, by hand.
    for name, p in trained.items():
        p.data.copy_(start[name.replace(".default", "")])
    optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        work.loss(work.batch("cleo", 1, step)).backward()
        optimizer.step()
    for name, p in trained.items():
        wanted = up["cleo"].content[name.replace(".default", "")]
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-5, atol=1e-7)


def test_fedavg_moves_the_adapter_both_ways(work: Work) -> None:
    method = FedAvgLora(work, 1e-2, 1, rank=2)
    count = sum(p.numel() for n, p in method.model.named_parameters() if "lora" in n)
    down = method.begin(1, ["ada"])["ada"]
    assert down.numbers == 4 * count
    assert method.local("ada", 1, down).numbers == 4 * count


def test_fedavg_with_checkpointing_trains_alike(work: Work, model: nn.Module) -> None:
    twin = copy.deepcopy(model)

    def loss(ids: Tensor) -> Tensor:
        return twin(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

    first = FedAvgLora(work, 1e-2, 2, rank=2, dropout=0.0)
    second = FedAvgLora(
        Work(twin, loss, work.batch, SIZES), 1e-2, 2, rank=2, dropout=0.0, checkpointing=True
    )
    for method in (first, second):
        run_round(method, 1)
    for name, value in first.adapter.items():
        torch.testing.assert_close(value, second.adapter[name], rtol=1e-5, atol=1e-7)
    second.restore(first.state())
    assert torch.equal(
        first.model(input_ids=work.batch("ada", 9, 0)).logits,
        second.model(input_ids=work.batch("ada", 9, 0)).logits,
    )


# --- MeZO ----------------------------------------------------------------------------------------


def test_mezo_steps_along_its_noise(model: nn.Module, work: Work) -> None:
    """Algorithm 1 of the paper: ``w - lr g z``, g a central difference."""
    lr, batch = 1e-3, work.batch("ada", 1, 0)
    parameters = list(model.parameters())
    start = weights_of(model)
    plus_loss = mezo.step(parameters, lambda: work.loss(batch), 11, EPS, lr)
    torch.manual_seed(11)
    z = {name: torch.normal(0.0, 1.0, p.shape).double() for name, p in model.named_parameters()}
    end = weights_of(model)
    ahead, behind = (loss_at(model, work, plus(start, (c, z)), batch) for c in (EPS, -EPS))
    assert abs(plus_loss - ahead) <= bound("difference of losses") * EPS
    along = sum(float(((end[n] - start[n]) * z[n]).sum()) for n in z)
    scalar = -along / lr / sum(float((v**2).sum()) for v in z.values())
    assert_scalar(scalar, (ahead - behind) / (2 * EPS))
    load(model, end)
    assert_near(model, plus(start, (-lr * scalar, z)))
