"""Noise in the forward, a direction for each few examples, against a forward a direction."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from zorba import ZerothOrderSGD

import zorba_kernels as zk
from tests.tolerances import bound

LLAMA = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=2, tie_word_embeddings=False,
)  # fmt: skip
GPT2 = GPT2Config(
    vocab_size=50, n_embd=32, n_layer=3, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
)
EXAMPLES = 7


def model_of(kind):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LLAMA) if kind == "llama" else GPT2LMHeadModel(GPT2)
    for name, parameter in model.named_parameters():
        # What the fused placement leaves out: then both placements train the same.
        parameter.requires_grad_(not any(part in name for part in ("embed", "wte", "wpe", "head")))
    return model.eval()


def task(model, rows=EXAMPLES):
    ids = torch.randint(0, 50, (rows, 9), generator=torch.Generator().manual_seed(1))

    def losses(batch=ids):
        logits = model(input_ids=batch).logits[:, :-1].transpose(1, 2)
        return nn.functional.cross_entropy(logits, batch[:, 1:], reduction="none").mean(1)

    return ids, losses


def stepped(kind, placement, steps=2, with_batch=False, **options):
    model = model_of(kind)
    ids, losses = task(model)
    options = {"distribution": "rank1", "directions": "own", "examples_per_direction": 3} | options
    optimizer = ZerothOrderSGD(model, 1e-3, eps=1e-2, placement=placement, **options)
    reports = []
    for _ in range(steps):
        if options["directions"] == "shared":
            optimizer.step(lambda: losses().mean())
        else:
            optimizer.step(losses, *([ids] if with_batch else []))
        reports.append(optimizer.last_step)
    return optimizer, reports


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("blocks", ["all", "last:2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_perturbations": 2},
        {"estimator": "forward"},
        {"directions": "shared"},
        {"momentum": 0.5, "clip": 1.0},
        {"normalize": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_equals_a_forward_for_each_direction(kind, blocks, options):
    fused, mine = stepped(kind, "fused", blocks=blocks, **options)
    scratch, theirs = stepped(kind, "scratch", blocks=blocks, **options)
    assert fused.placement.table.names == scratch.placement.table.names
    for a, b in zip(mine, theirs, strict=True):
        assert len(a.scalars) == len(b.scalars)
        assert a.loss == pytest.approx(b.loss, rel=1e-3)
        largest = max(map(abs, b.scalars))
        for g, h in zip(a.scalars, b.scalars, strict=True):
            assert abs(g - h) <= bound("fused scalar") * largest


@pytest.mark.parametrize("count", [1, 2])
def test_both_signs_in_one_batch_are_two_calls(count):
    _, one = stepped("llama", "fused", with_batch=True, num_perturbations=count)
    _, two = stepped("llama", "fused", num_perturbations=count)
    for a, b in zip(one, two, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=bound("fused loss"))
        largest = max(map(abs, b.scalars))
        assert all(
            abs(g - h) <= bound("fused scalar") * largest
            for g, h in zip(a.scalars, b.scalars, strict=True)
        )


def dropping(with_batch):
    """Scalars of two steps of a model with dropout, and the rows of each call of the closure."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1)).train()
    batch, rows = torch.randn(EXAMPLES, 4), []

    def losses(x=batch):
        rows.append(len(x))
        return model(x).square().squeeze(1)

    options = {"placement": "fused", "directions": "own", "examples_per_direction": 3}
    optimizer = ZerothOrderSGD(model, 1e-3, eps=1e-2, **options)
    scalars = []
    for _ in range(2):
        optimizer.step(losses, *([batch] if with_batch else []))
        scalars += optimizer.last_step.scalars
    return scalars, rows


def test_dropout_has_the_same_masks_on_both_sides():
    """One batch of both signs would draw masks for each half: it is given up, and two calls run."""
    scalars, rows = dropping(with_batch=True)
    assert rows == [2 * EXAMPLES] + 4 * [EXAMPLES]
    assert scalars == dropping(with_batch=False)[0]


@pytest.mark.parametrize("sizes", [(3, 4), (4, 3), (2, 2, 3)])
@pytest.mark.parametrize("estimator", ["central", "forward"])
def test_parts_of_a_batch_have_its_directions(sizes, estimator):
    found = []
    for parts in (sizes, (EXAMPLES,)):
        model = model_of("llama")
        ids, losses = task(model)
        options = {"num_perturbations": 2, "estimator": estimator, "examples_per_direction": 3}
        optimizer = ZerothOrderSGD(
            model, 1e-3, eps=1e-2, placement="fused", directions="own", **options
        )

        def in_parts(parts=parts, ids=ids, losses=losses, optimizer=optimizer):
            made = []
            for part in ids.split(parts):
                optimizer.rows_from(sum(map(len, made)))
                made.append(losses(part))
            return torch.cat(made)

        optimizer.step(in_parts)
        found.append(optimizer.last_step.scalars)
    largest = max(map(abs, found[1]))
    for g, h in zip(*found, strict=True):
        assert abs(g - h) <= bound("fused scalar") * largest


def test_parts_must_be_of_the_rows_that_ran():
    model, x = nn.Linear(4, 1), torch.randn(6, 4)
    optimizer = ZerothOrderSGD(model, 1e-2, placement="fused", directions="own")

    def losses():
        optimizer.rows_from(0)
        first = model(x[:3])
        optimizer.rows_from(2)
        return torch.cat([first, model(x[3:])]).squeeze(1)

    with pytest.raises(ValueError, match=r"2 losses.*3 rows"):
        optimizer.step(losses)


def test_a_head_that_computes_a_part_of_its_logits_is_named():
    from zorba.hf import narrow_logits

    torch.manual_seed(0)
    model, two = LlamaForCausalLM(LLAMA).eval(), torch.tensor([0, 1])
    model.model.embed_tokens.requires_grad_(False)
    ids = torch.randint(0, 50, (2, 9))
    optimizer = ZerothOrderSGD(model, 1e-2, placement="fused", directions="own")
    with pytest.raises(ValueError, match=r"'lm_head' \(Linear\) made .*freeze"):
        optimizer.step(lambda: narrow_logits(model, {"input_ids": ids}, two, two + 5, two)[:, 0])


def test_a_direction_of_fewer_examples_counts_for_less():
    """7 examples by 3: the mean of the scalars weighs all examples alike."""
    from zorba.optim.own import own_scalars

    losses = [torch.arange(7.0).double().numpy(), torch.zeros(7).double().numpy()]
    scalars = own_scalars(losses, 0.5, "central", 3)
    assert scalars == pytest.approx([3 * 3 / 7, 12 * 3 / 7, 6 * 3 / 7])
    assert math.fsum(scalars) / 3 == pytest.approx(3.0)


@pytest.mark.parametrize("directions", ["own", "shared"])
def test_steps_without_a_rate_leave_every_bit(directions):
    model = model_of("llama")
    _, losses = task(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = ZerothOrderSGD(model, 0.0, placement="fused", directions=directions)
    for _ in range(20):
        optimizer.step(losses if directions == "own" else lambda: losses().mean())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("call", range(2))
def test_a_closure_that_raises_leaves_the_weights_and_the_model(call):
    model = model_of("gpt2")
    _, losses = task(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    addresses = [p.data_ptr() for p in model.parameters()]
    optimizer = ZerothOrderSGD(model, 1e-2, placement="fused", directions="own")
    calls = 0

    def failing():
        nonlocal calls
        found = losses()
        calls += 1
        if calls > call:
            raise KeyboardInterrupt
        return found

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_without_noise_are_named_and_stay():
    model = LlamaForCausalLM(LLAMA).eval()
    _, losses = task(model)
    with pytest.warns(UserWarning, match=r"embed_tokens.weight \(Embedding\).*stay"):
        optimizer = ZerothOrderSGD(model, 1e-2, placement="fused", directions="own")
    before = model.model.embed_tokens.weight.detach().clone()
    optimizer.step(losses)
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_a_layer_that_sees_other_rows_is_named():
    class Folding(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.second(self.first(x).reshape(-1, 4)).reshape(len(x), -1).mean(1)

    model, x = Folding(), torch.randn(6, 5, 4)
    start = zk.fingerprint(zk.ParamTable(model.named_parameters()))
    optimizer = ZerothOrderSGD(model, 1e-2, placement="fused", directions="own")
    with pytest.raises(ValueError, match=r"'second' .*saw rows"):
        optimizer.step(lambda: model(x))
    assert zk.fingerprint(zk.ParamTable(model.named_parameters())) == start
    ZerothOrderSGD(model, 1e-2, placement="fused").step(lambda: model(x).mean())


@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.ones(3, 3), torch.ones(0)])
def test_a_closure_without_a_loss_for_each_example_is_refused(value):
    optimizer = ZerothOrderSGD(nn.Linear(2, 2), 1e-2, placement="fused", directions="own")
    with pytest.raises(ValueError, match="a loss for each example"):
        optimizer.step(lambda: value)


def test_losses_and_rows_must_agree():
    model = nn.Linear(4, 1)
    optimizer = ZerothOrderSGD(model, 1e-2, placement="fused", directions="own")
    with pytest.raises(ValueError, match=r"3 losses.*6 rows"):
        optimizer.step(lambda: model(torch.ones(6, 4)).reshape(3, 2).mean(1))


def test_other_noise_is_refused():
    with pytest.raises(ValueError, match="rank1"):
        ZerothOrderSGD(nn.Linear(2, 2), 1e-2, placement="fused", distribution="gaussian")


def test_states_of_other_directions_are_refused_and_those_of_an_earlier_version_are_not():
    model, x = nn.Linear(2, 2), torch.ones(4, 2)
    options = {"momentum": 0.5, "seed": 3}
    optimizer = ZerothOrderSGD(model, 1e-2, **options)
    optimizer.step(lambda: model(x).sum())
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="of directions 'shared'"):
        ZerothOrderSGD(model, 1e-2, directions="own", **options).load_state_dict(state)
    # Version 0.1.0 had no such options.
    for group in state["param_groups"]:
        for name in ("directions", "examples_per_direction", "normalize"):
            del group[name]
    again = ZerothOrderSGD(model, 1e-2, **options)
    again.load_state_dict(state)
    again.step(lambda: model(x).sum())
    assert again.param_groups[0]["step"] == 2


# --- Weights, and models that share them ---------------------------------------------------------
