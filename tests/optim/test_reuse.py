"""Prefix reuse: fewer block forwards, and the same bits."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zorba import ZerothOrderSGD
from zorba.hf import find_blocks

from tests.hf.tiny import tiny_config
from tests.optim.models import same_bits, snapshot
from tests.tolerances import bound

TEXT = (
    "llama qwen3 gemma3_text phi gpt_neox bloom falcon opt gpt2 mixtral mamba olmo2".split()  # noqa: SIM905
)
MASKED = ["bert", "roberta", "modernbert", "deberta-v2", "electra"]
PAIRS = ["t5", "bart"]


def tiny(name: str, rng: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    torch.manual_seed(rng.seed)
    config = tiny_config(name)
    if name in MASKED:
        model: nn.Module = AutoModelForMaskedLM.from_config(config)
    elif name in PAIRS:
        config.decoder_start_token_id = 0
        model = AutoModelForSeq2SeqLM.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():  # tiny models start near zero, where losses would not differ
        p.data.add_(0.1 * torch.randn_like(p))
    return model


def calls_of(model: nn.Module) -> list[int]:
    """Counts the forwards of each block from here on."""
    counts = [0] * len(find_blocks(model))

    def count(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            counts[index] += 1

        return hook

    for index, block in enumerate(find_blocks(model)):
        inside = [m for m in block.module.modules() if not isinstance(m, nn.ModuleList)]
        inner = inside[1]
        inner.register_forward_hook(count(index))
    return counts


def run(model: nn.Module, steps: int, batch: dict[str, Tensor], **options: Any) -> list[Any]:
    optimizer = ZerothOrderSGD(model, lr=1e-2, num_perturbations=2, **options)
    reports = []
    for _ in range(steps):
        optimizer.step(lambda: model(**batch).loss)
        reports.append((optimizer.last_step.scalars, optimizer.last_step.loss))
    return reports


# Reuse does not know the placement: one of each kind of model is enough in place.
ARCHITECTURES = [(name, "scratch") for name in TEXT + MASKED + PAIRS] + [
    (name, "inplace") for name in ("llama", "bert", "t5")
]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "dropout"])
@pytest.mark.parametrize(("name", "placement"), ARCHITECTURES)
def test_same_bits_and_fewer_forwards(name: str, training: bool, placement: str, rng: Any) -> None:
    ids = torch.randint(1, 100, (3, 7), generator=rng.generator)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    batch = {"input_ids": ids, "labels": ids, "attention_mask": mask}
    results = []
    for reuse in (True, False):
        model = tiny(name, rng).train(training)
        counts = calls_of(model)
        reports = run(model, 2, batch, blocks="last:1", prefix_reuse=reuse, placement=placement)
        results.append((reports, snapshot(model), counts))
    (reused, weights, fewer), (plain, expected, all_calls) = results
    assert reused == plain
    assert all((weights[n] == expected[n]).all() for n in expected)
    assert any(g != 0.0 for scalars, _ in reused for g in scalars)
    # Two steps of four evaluations: every block runs eight times, or twice where it is reused. The
    # first evaluation is made again to prove that, and in Mamba, which uses weights directly, once
    # more to see them perturbed.
    again = int(name == "mamba" and placement == "scratch")
    assert all_calls == [8 + again] * len(all_calls)
    assert fewer == [2 + again] * (len(fewer) - 1) + [9 + again]


def test_a_trainable_head_makes_all_blocks_prefix(rng: Any) -> None:
    model = tiny("llama", rng)
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    counts = calls_of(model)
    ids = torch.randint(1, 100, (3, 7), generator=rng.generator)
    run(model, 1, {"input_ids": ids, "labels": ids})
    assert counts == [1, 1, 1]


def test_an_active_embedding_leaves_no_prefix(rng: Any) -> None:
    model = tiny("llama", rng)
    model.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(True)
    model.model.layers[2].requires_grad_(True)
    counts = calls_of(model)
    ids = torch.randint(1, 100, (3, 7), generator=rng.generator)
    run(model, 1, {"input_ids": ids, "labels": ids})
    assert counts == [4, 4, 5], "skipped in the proof alone, whose noise is the same"


def test_weights_used_directly_leave_no_prefix(rng: Any) -> None:
    """An embedding that is looked up without its module runs in front of all blocks."""

    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(100, 8)
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))

        def forward(self, ids: Tensor) -> Tensor:
            hidden = nn.functional.embedding(ids, self.embed.weight)
            for layer in self.layers:
                hidden = layer(hidden)
            return hidden.square().mean()

    ids = torch.arange(10)
    results = []
    for placement in ("scratch", "inplace"):
        torch.manual_seed(rng.seed)
        model = Direct()
        model.layers[:2].requires_grad_(False)
        optimizer = ZerothOrderSGD(model, lr=0.0, eps=0.1, placement=placement)
        optimizer.step(lambda model=model: model(ids))
        results.append(optimizer.last_step.scalars)
    assert results[0] == pytest.approx(results[1], rel=bound("other placement"))


def test_several_forwards_in_one_closure(rng: Any) -> None:
    """Micro-batches: each call of a stack has its own prefix."""
    batches = [torch.randint(1, 100, (2, n), generator=rng.generator) for n in (5, 7)]

    def losses(reuse: bool) -> tuple[Any, list[int]]:
        model = tiny("llama", rng)
        counts = calls_of(model)
        optimizer = ZerothOrderSGD(model, lr=1e-2, blocks="last:1", prefix_reuse=reuse)
        optimizer.step(lambda: sum(model(input_ids=b, labels=b).loss for b in batches))
        return (optimizer.last_step.scalars, snapshot(model)), counts

    (reused, weights), counts = losses(True)
    (plain, expected), _ = losses(False)
    assert reused == plain
    assert all(torch.equal(weights[n], expected[n]) for n in expected)
    assert counts == [2, 2, 6], "two evaluations and the proof"


def test_inputs_that_change_between_evaluations_are_noticed(rng: Any) -> None:
    """A closure that breaks the rule of one batch a step gets what it would get without reuse."""
    batches = [torch.randint(1, 100, (2, 6), generator=rng.generator) for _ in range(3)]

    def scalars(reuse: bool) -> Any:
        model = tiny("llama", rng)
        optimizer = ZerothOrderSGD(model, lr=1e-2, blocks="last:1", prefix_reuse=reuse)
        optimizer.step(lambda: model(input_ids=batches[0], labels=batches[0]).loss)
        turn = iter(batches[1:])

        def closure() -> Tensor:
            ids = next(turn)
            return model(input_ids=ids, labels=ids).loss

        optimizer.step(closure)
        return optimizer.last_step.scalars

    assert scalars(reuse=True) == scalars(reuse=False)


READ_OTHERWISE = {
    "hidden states of an early layer": lambda model, ids: (
        model(input_ids=ids, output_hidden_states=True).hidden_states[1].square().mean()
        + model(input_ids=ids, labels=ids).loss
    ),
    "attentions": lambda model, ids: sum(
        a.square().mean() for a in model(input_ids=ids, output_attentions=True).attentions
    ),
}


@pytest.mark.parametrize("case", READ_OTHERWISE)
def test_what_is_read_besides_the_last_output(case: str, rng: Any) -> None:
    ids = torch.randint(1, 100, (2, 6), generator=rng.generator)

    def scalars(reuse: bool) -> Any:
        model = tiny("llama", rng)
        model.config._attn_implementation = "eager"
        optimizer = ZerothOrderSGD(model, lr=1e-2, blocks="last:1", prefix_reuse=reuse)
        for _ in range(2):
            optimizer.step(lambda: READ_OTHERWISE[case](model, ids))
        return optimizer.last_step.scalars

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert scalars(reuse=True) == scalars(reuse=False)


def test_losses_of_routers_are_no_output_of_a_block(rng: Any) -> None:
    """transformers collects them by hooks inside blocks, which skipped blocks do not run."""
    ids = torch.randint(1, 100, (2, 6), generator=rng.generator)

    def scalars(reuse: bool) -> Any:
        model = tiny("mixtral", rng)
        optimizer = ZerothOrderSGD(model, lr=1e-2, blocks="last:1", prefix_reuse=reuse)
        optimizer.step(lambda: model(input_ids=ids, labels=ids, output_router_logits=True).loss)
        return optimizer.last_step.scalars

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert scalars(reuse=True) == scalars(reuse=False)


class _Skips(nn.Module):
    """The output of the first block is added behind the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block() for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        none = torch.zeros(1)
        first = self.layers[0](hidden, none)
        for layer in self.layers[1:]:
            first, hidden = first, layer(first if hidden is first else hidden, none)
        return (hidden + first).square().mean()


def test_a_skip_between_blocks_keeps_every_output(rng: Any) -> None:
    """Proven to the bit, so it is still reused, and nobody is warned."""
    x = torch.randn(2, 4, generator=rng.generator)

    def scalars(reuse: bool) -> tuple[Any, list[int]]:
        torch.manual_seed(rng.seed)
        model = _Skips()
        model.layers[:3].requires_grad_(False)
        counts = calls_of(model)
        optimizer = ZerothOrderSGD(model, lr=1e-2, prefix_reuse=reuse)
        for _ in range(3):
            optimizer.step(lambda: model(x))
        return optimizer.last_step.scalars, counts

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (reused, counts), (plain, _) = scalars(reuse=True), scalars(reuse=False)
    assert reused == plain
    assert counts[0] == 4, "twice in the first step, to keep every output, then once a step"


def test_layers_that_are_dropped_at_random(rng: Any) -> None:
    """LayerDrop draws between blocks: skipped ones must leave the generator where they left it."""
    ids = torch.randint(1, 100, (2, 6), generator=rng.generator)

    def scalars(reuse: bool) -> Any:
        config = tiny_config("opt")
        config.layerdrop = 0.4
        torch.manual_seed(rng.seed)
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config).train()
        optimizer = ZerothOrderSGD(model, lr=1e-2, blocks="last:1", prefix_reuse=reuse)
        seen = []
        for step in range(12):
            torch.manual_seed(step)
            optimizer.step(lambda: model(input_ids=ids, labels=ids).loss)
            seen.append(optimizer.last_step.scalars)
        return seen

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert scalars(reuse=True) == scalars(reuse=False)


def test_a_later_block_that_gets_something_else_ends_reuse(rng: Any) -> None:
    """Detected in the middle of a forward: the evaluation is made again, with a warning."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(_Block() for _ in range(4))
            self.calls = 0

        def forward(self, hidden: Tensor) -> Tensor:
            self.calls += 1
            for i, layer in enumerate(self.layers):
                shift = torch.full((1,), float(self.calls) if i == 2 else 0.0)
                hidden = layer(hidden, shift)
            return hidden.square().mean()

    torch.manual_seed(rng.seed)
    model = Odd()
    model.layers[:3].requires_grad_(False)
    x = torch.randn(2, 4, generator=rng.generator)
    optimizer = ZerothOrderSGD(model, lr=1e-2)
    with pytest.warns(UserWarning, match="prefix reuse is switched off"):
        optimizer.step(lambda: model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: model(x))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden: Tensor, shift: Tensor) -> Tensor:
        return self.linear(hidden) + shift


@pytest.mark.parametrize("at", [1, 2, 3])
def test_nothing_is_left_behind(at: int, rng: Any) -> None:
    model = tiny("llama", rng)
    before = snapshot(model)
    ids = torch.randint(1, 100, (2, 6), generator=rng.generator)
    calls = []

    def closure() -> Tensor:
        loss = model(input_ids=ids, labels=ids).loss
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return loss

    optimizer = ZerothOrderSGD(model, lr=0.0, blocks="last:1")

    def two_steps() -> None:
        optimizer.step(closure)
        optimizer.step(closure)

    with pytest.raises(KeyboardInterrupt):
        two_steps()
    assert same_bits(model, before)
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
