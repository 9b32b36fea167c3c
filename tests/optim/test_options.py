"""Options of ZerothOrderSGD: groups, blocks, clipping, momentum, objectives."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from zorba import ZerothOrderSGD
from zorba.optim import active_table
from zorba.optim.terms import window

import zorba_kernels as zk
from tests.optim.models import Tied, same_bits, snapshot, task


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


# --- Groups --------------------------------------------------------------------------------------


def test_groups_have_their_own_lr_eps_and_decay(generator: torch.Generator) -> None:
    """By hand: group g is moved by eps_g, and updated with the difference over its own eps."""
    model, closure = task(generator)
    groups = [{"params": ["norm.weight", model.norm.bias], "lr": 0.5, "eps": 0.02}]
    groups += [{"params": ["layers.0.weight"], "weight_decay": 0.1, "lr": 0.0}]
    optimizer = ZerothOrderSGD(model, lr=0.1, eps=0.01, groups=groups, rounding="nearest")
    assert [len(g["params"]) for g in optimizer.param_groups] == [4, 2, 1]
    start = snapshot(model)
    optimizer.step(closure)
    stepped, report = snapshot(model), optimizer.last_step
    table = optimizer.placement.table
    losses = []
    for sign in (1, -1):
        model.load_state_dict(start, strict=False)
        zk.add_noise_(table, report.seed, [[sign * e] for e in (0.01, 0.02, 0.01)])
        losses.append(float(closure().detach()))
    g = report.scalars[0]
    assert g == pytest.approx((losses[0] - losses[1]) / 2 / 0.01, rel=1e-12)
    model.load_state_dict(start, strict=False)
    zk.add_noise_(table, report.seed, [[-0.1 * g], [-0.5 / 2.0 * g], [0.0]], decay=[0.0, 0.0, 0.0])
    assert same_bits(model, stepped)


def test_schedulers_move_every_group(generator: torch.Generator) -> None:
    model, closure = task(generator)
    groups = [{"params": ["norm.weight"], "lr": 0.5}]
    optimizer = ZerothOrderSGD(model, lr=0.1, groups=groups)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=2)
    for expected in ([0.1, 0.5], [0.05, 0.25], [0.0, 0.0]):
        before = snapshot(model)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(expected)
        optimizer.step(closure)
        assert same_bits(model, before) == (expected[0] == 0.0)
        scheduler.step()


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([{"params": ["norm.weight"], "seed": 3}], "group 0 has the keys"),
        ([{"lr": 0.1}], "group 0 has the keys"),
        ([{"params": ["nothing"]}], "nothing is not active"),
        ([{"params": ["norm.bias"]}, {"params": ["norm.bias"]}], "group 1: norm.bias"),
        ([{"params": [nn.Parameter(torch.ones(2))]}], "a parameter is not active"),
        ([{"params": []}], "group 0 has no parameters"),
        ([{"params": ["norm.bias"], "lr": -1.0}], "lr must be"),
        ([{"params": ["norm.bias"], "eps": 0.0}], "eps must be"),
    ],
)
def test_bad_groups_say_what_was_wrong(groups: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ZerothOrderSGD(Tied(), lr=0.1, groups=groups)


# --- Blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", ["last:1", [False, False, False, True], torch.arange(4) == 3])
def test_blocks_restrict_what_is_trained(blocks: Any) -> None:
    model = tiny_llama()
    model.model.layers[3].mlp.requires_grad_(False)
    before = snapshot(model)
    optimizer = ZerothOrderSGD(model, lr=1.0, blocks=blocks)
    ids = torch.arange(10).reshape(2, 5)
    optimizer.step(lambda: model(input_ids=ids, labels=ids).loss)
    for name, p in model.named_parameters():
        trained = name.startswith("model.layers.3.") and ".mlp." not in name
        assert trained == (name in optimizer.placement.table.names)
        assert torch.equal(p, before[name]) != trained, name


@pytest.mark.parametrize(
    "blocks", ["last:0", "last:5", "last", "first:1", [True] * 3, [0, 0, 0, 2], [False] * 4]
)
def test_bad_blocks_say_what_was_wrong(blocks: Any) -> None:
    words = "requires_grad=True in blocks=" if blocks == [False] * 4 else "blocks"
    with pytest.raises(ValueError, match=words):
        ZerothOrderSGD(tiny_llama(), lr=1.0, blocks=blocks)


# --- Scalars -------------------------------------------------------------------------------------


def test_clip_limits_the_scalars(generator: torch.Generator) -> None:
    model = nn.Linear(4, 4, bias=False)
    start = snapshot(model)
    for clip in (None, 0.5):
        model.load_state_dict(start)
        optimizer = ZerothOrderSGD(model, lr=1e-3, clip=clip, rounding="nearest")
        optimizer.step(lambda: 100 * model(torch.ones(1, 4)).sum())
        g = optimizer.last_step.scalars[0]
        assert abs(g) == 0.5 if clip else abs(g) > 0.5
        after = snapshot(model)
        model.load_state_dict(start)
        zk.add_noise_(active_table(model), optimizer.last_step.seed, -1e-3 * g)
        assert same_bits(model, after)


@pytest.mark.parametrize("count", [1, 3])
def test_momentum_is_heavy_ball_sgd(count: int, generator: torch.Generator) -> None:
    """Against a velocity that is kept, less what lies behind the window."""
    model, closure = task(generator)
    start = snapshot(model)
    lr, momentum, number = 1e-3, 0.6, 20
    assert window(momentum) == 10
    optimizer = ZerothOrderSGD(model, lr, momentum=momentum, num_perturbations=count, seed=3)
    steps = []
    for _ in range(number):
        optimizer.step(closure)
        steps.append(optimizer.last_step)
    for name, before in start.items():
        stream = zk.noise.stream_of(name)
        expected = before.double()
        velocity_kept = torch.zeros_like(expected)
        directions = []
        for t, report in enumerate(steps):
            made = [
                g * zk.noise(before.shape, seed=report.seed, stream=stream, sample=p)
                for p, g in enumerate(report.scalars)
            ]
            directions.append(sum(made).double() / count)
            velocity_kept = momentum * velocity_kept + directions[t]
            if t >= 10:
                velocity_kept -= momentum**10 * directions[t - 10]
            expected -= lr * velocity_kept
        # float32 roundings of weights and sums of magnitude 4 at most, one a step
        limit = number * 4 * 2.0**-23
        after = model.get_parameter(name).detach().double()
        torch.testing.assert_close(after, expected, rtol=0, atol=limit)


def test_an_objective_without_derivative(generator: torch.Generator) -> None:
    """Accuracy rises: what is minimised is its negative, a step function of the weights."""
    x = torch.randn(400, 6, generator=generator)
    labels = (x @ torch.tensor([1.0, -2, 0.5, 0, 1, 3]) > 0).long()
    model = nn.Linear(6, 2)

    def accuracy() -> float:
        return float((model(x).argmax(dim=1) == labels).float().mean())

    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([1.0, 0.0]))
    before = accuracy()
    optimizer = ZerothOrderSGD(model, lr=0.3, eps=0.3, num_perturbations=8)
    for _ in range(60):
        optimizer.step(lambda: -accuracy())
    assert accuracy() > before + 0.2


def test_a_recorder_is_told_every_update(generator: torch.Generator) -> None:
    """What it is told, applied to the start, gives the weights."""
    model, closure = task(generator, torch.bfloat16)
    start = snapshot(model)
    optimizer = ZerothOrderSGD(model, lr=0.05, momentum=0.5, weight_decay=0.1)
    optimizer.recorder = Mock()
    for value in (0.0, 0.0, float("nan"), 0.0):
        optimizer.step(lambda value=value: closure() + value)
    stepped = snapshot(model)
    told = [call.args for call in optimizer.recorder.append.call_args_list]
    assert [step for step, *_ in told] == [0, 1, 3]
    optimizer.recorder.skip.assert_called_once_with(2)
    model.load_state_dict(start, strict=False)
    for _, terms, rounding_seed, decay in told:
        zk.add_noise_(
            active_table(model), terms.seeds, terms.coefs, "gaussian", "stochastic",
            rounding_seed, samples=terms.samples, decay=decay,
        )  # fmt: skip
    assert same_bits(model, stepped)
