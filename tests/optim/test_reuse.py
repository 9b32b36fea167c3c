"""Prefix reuse: fewer block forwards, and the same bits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache
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


def tiny(name: str, rng: Any, **changes: Any) -> nn.Module:
    torch.manual_seed(rng.seed)
    config = tiny_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    kind = "ForMaskedLM" if name in MASKED else "ForCausalLM"
    if name in PAIRS:
        kind, config.decoder_start_token_id = "ForSeq2SeqLM", 0
    model: nn.Module = getattr(transformers, f"AutoModel{kind}").from_config(config)
    for p in model.parameters():  # tiny models start near zero, where losses would not differ
        p.data.add_(0.1 * torch.randn_like(p))
    return model


def calls_of(model: nn.Module) -> list[int]:
    """Counts the forwards of each block from here on: of the first module inside of it."""
    blocks = find_blocks(model)
    counts = [0] * len(blocks)

    for index, block in enumerate(blocks):

        def count(*hook_arguments: Any, index: int = index) -> None:
            counts[index] += 1

        inside = [m for m in block.module.modules() if not isinstance(m, nn.ModuleList)]
        inside[1].register_forward_hook(count)
    return counts


def ids_of(rng: Any, rows: int = 2, columns: int = 6) -> Tensor:
    return torch.randint(1, 100, (rows, columns), generator=rng.generator)


def same_with_and_without(
    make: Callable[[], nn.Module], loss: Callable[[nn.Module], Any], steps: int = 2, **options: Any
) -> tuple[list[int], list[int]]:
    """Asserts equal reports and weights; returns how often blocks ran with reuse, and without."""
    results, counts = [], []
    for reuse in (True, False):
        model = make()
        counts.append(calls_of(model))
        given = {"lr": 1e-2, "blocks": "last:1", **options}
        optimizer = ZerothOrderSGD(model, prefix_reuse=reuse, **given)
        reports = []
        for step in range(steps):
            torch.manual_seed(step)  # of dropout, and of layers that are left out
            optimizer.step(lambda model=model: loss(model))
            reports.append((optimizer.last_step.scalars, optimizer.last_step.loss))
        results.append((model, reports))
    (mine, reused), (other, plain) = results
    assert reused == plain
    assert any(g != 0.0 for scalars, _ in reused for g in scalars)
    assert same_bits(mine, snapshot(other))
    return counts[0], counts[1]


# --- Where it works ------------------------------------------------------------------------------

# Reuse does not know the placement: one of each kind of model is enough for the others.
ARCHITECTURES = [(name, "scratch") for name in TEXT + MASKED + PAIRS] + [
    (name, placement) for name in ("llama", "bert", "t5") for placement in ("inplace", "fused")
]


@pytest.mark.filterwarnings("ignore:placement=.fused. cannot")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "dropout"])
@pytest.mark.parametrize(("name", "placement"), ARCHITECTURES)
def test_same_bits_and_fewer_forwards(name: str, training: bool, placement: str, rng: Any) -> None:
    ids = ids_of(rng, 3, 7)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    batch = {"input_ids": ids, "labels": ids, "attention_mask": mask}
    fewer, all_calls = same_with_and_without(
        lambda: tiny(name, rng).train(training),
        lambda model: model(**batch).loss,
        num_perturbations=2,
        placement=placement,
    )
    # Two steps of four evaluations: every block runs eight times, or twice where it is reused. The
    # first evaluation is made again to prove that, and in Mamba, which uses weights directly, once
    # more to see them perturbed.
    again = int(name == "mamba" and placement == "scratch")
    assert all_calls == [8 + again] * len(all_calls)
    assert fewer == [2 + again] * (len(fewer) - 1) + [9 + again]


def losses_of(model: nn.Module, ids: Tensor) -> Tensor:
    """One for each row."""
    logits = model(input_ids=ids).logits[:, :-1].float().transpose(1, 2)
    return nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").mean(1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("placement", ["fused", "scratch"])
def test_own_directions(name: str, placement: str, rng: Any) -> None:
    ids = ids_of(rng, 4, 7)
    options = {"placement": placement, "distribution": "rank1", "directions": "own"}
    fewer, all_calls = same_with_and_without(
        lambda: tiny(name, rng).eval(),
        lambda model: losses_of(model, ids),
        examples_per_direction=2,
        **options,
    )
    # Two steps of both signs, all directions in one forward; or of each of two directions. And the
    # proof.
    each = 2 if placement == "fused" else 4
    assert all_calls == [2 * each] * len(all_calls)
    assert fewer == [2] * (len(fewer) - 1) + [2 * each + 1]


def test_own_directions_of_both_signs_in_one_batch(rng: Any) -> None:
    """With reuse they are two: other orders of sums."""
    ids, found = ids_of(rng, 4, 7), []
    for reuse in (True, False):
        model = tiny("llama", rng).eval()
        counts = calls_of(model)
        optimizer = ZerothOrderSGD(
            model, lr=1e-2, eps=1e-2, blocks="last:1", prefix_reuse=reuse, placement="fused",
            directions="own", examples_per_direction=2,
        )  # fmt: skip
        for _ in range(2):
            optimizer.step(lambda batch, model=model: losses_of(model, batch), ids)
            found.append(optimizer.last_step.scalars)
        assert counts == ([2, 2, 5] if reuse else [2, 2, 2])
    for with_reuse, without in zip(found[:2], found[2:], strict=True):
        largest = max(map(abs, without))
        for g, h in zip(with_reuse, without, strict=True):
            assert abs(g - h) <= bound("fused scalar") * largest


@pytest.mark.parametrize(
    ("active", "counts"),
    [
        (["lm_head"], [1, 1, 1]),
        # Skipped in the proof alone, whose noise is the same.
        (["model.embed_tokens", "model.layers.2"], [2, 2, 3]),
    ],
    ids=["head", "embedding"],
)
def test_active_modules_around_the_blocks(active: list[str], counts: list[int], rng: Any) -> None:
    """All blocks are prefix of a head; an embedding in front of them leaves none."""
    ids = ids_of(rng)

    def make() -> nn.Module:
        model = tiny("llama", rng).requires_grad_(False)
        for name in active:
            model.get_submodule(name).requires_grad_(True)
        return model

    seen, _ = same_with_and_without(
        make, lambda model: model(input_ids=ids, labels=ids).loss, 1, blocks="all"
    )
    assert seen == counts


def test_several_forwards_in_one_closure(rng: Any) -> None:
    """Micro-batches: each call of a stack has its own prefix."""
    batches = [ids_of(rng, columns=n) for n in (5, 7)]
    counts, _ = same_with_and_without(
        lambda: tiny("llama", rng),
        lambda model: sum(model(input_ids=b, labels=b).loss for b in batches),
        1,
    )
    assert counts == [2, 2, 6], "two evaluations and the proof"


def test_layers_that_are_dropped_at_random(rng: Any) -> None:
    """LayerDrop draws between blocks: skipped ones must leave the generator where they left it."""
    ids = ids_of(rng)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same_with_and_without(
            lambda: tiny("opt", rng, layerdrop=0.4).train(),
            lambda model: model(input_ids=ids, labels=ids).loss,
            12,
        )


# --- Where it must not be relied on --------------------------------------------------------------


def test_inputs_that_change_between_evaluations_are_noticed(rng: Any) -> None:
    """A closure that breaks the rule of one batch a step gets what it would get without reuse."""
    first, *others = (ids_of(rng) for _ in range(3))
    results = []
    for reuse in (True, False):
        model = tiny("llama", rng)
        optimizer = ZerothOrderSGD(model, lr=1e-2, blocks="last:1", prefix_reuse=reuse)
        for batches in ([first] * 3, others):
            inputs = ({"input_ids": ids, "labels": ids} for ids in batches)
            optimizer.step(lambda model=model, inputs=inputs: model(**next(inputs)).loss)
        results.append(optimizer.last_step.scalars)
    assert results[0] == results[1]


def _hidden_states(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(input_ids=ids, labels=ids, output_hidden_states=True)
    return out.hidden_states[1].square().mean() + out.loss


def _attentions(model: nn.Module, ids: Tensor) -> Any:
    return sum(a.square().mean() for a in model(input_ids=ids, output_attentions=True).attentions)


def _routers(model: nn.Module, ids: Tensor) -> Tensor:
    # transformers collects their losses by hooks inside blocks, which skipped blocks do not run.
    return model(input_ids=ids, labels=ids, output_router_logits=True).loss


def _cache(model: nn.Module, ids: Tensor) -> Tensor:
    # Positions in a cache were made by earlier forwards, which reuse knows nothing of.
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :3], past_key_values=cache)
    return model(input_ids=ids[:, 3:], past_key_values=cache).logits.square().mean()


def _generation(model: nn.Module, ids: Tensor) -> Tensor:
    # Its key-value cache must hold every block's positions.
    out = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=-1)
    return out[:, 6:].float().mean()


OFF = "prefix reuse is switched off"


@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
@pytest.mark.parametrize(
    ("read", "name", "warning"),
    [
        (_hidden_states, "llama", OFF),
        (_attentions, "llama", None),
        (_routers, "mixtral", OFF),
        (_cache, "llama", OFF),
        (_generation, "llama", OFF),
    ],
)
def test_what_is_read_besides_the_last_output(
    read: Callable[..., Any], name: str, warning: str | None, rng: Any
) -> None:
    ids = ids_of(rng)

    def make() -> nn.Module:
        return tiny(name, rng, _attn_implementation="eager").eval()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        same_with_and_without(make, lambda model: read(model, ids), eps=1.0)
    assert warning is None or any(warning in str(w.message) for w in caught)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: Tensor, shift: Tensor) -> Tensor:
        return self.linear(hidden) + shift


class _Blocks(nn.Module):
    """Four blocks, the last one active; behind them the output of the first is added.

    Or the third gets something else in each evaluation.
    """

    def __init__(self, odd: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block() for _ in range(4))
        self.layers[:3].requires_grad_(False)
        self.odd, self.calls = odd, 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        outputs = []
        for i, layer in enumerate(self.layers):
            shift = torch.full((1,), float(self.calls) if self.odd and i == 2 else 0.0)
            hidden = layer(hidden, shift)
            outputs.append(hidden)
        return (hidden if self.odd else hidden + outputs[0]).square().mean()


@pytest.mark.parametrize("odd", [False, True], ids=["a skip", "other inputs"])
def test_it_is_switched_off_with_one_warning(odd: bool, rng: Any) -> None:
    """Found out by the proof, or in the middle of a forward: the evaluation is made again."""
    torch.manual_seed(rng.seed)
    model, x = _Blocks(odd), torch.randn(2, 8, generator=rng.generator)
    optimizer = ZerothOrderSGD(model, lr=1e-2)
    with pytest.warns(UserWarning, match=OFF) as caught:
        optimizer.step(lambda: model(x))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: model(x))


class _Direct(nn.Module):
    """Its embedding is looked up without its module, in front of all blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))
        self.layers[:2].requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = nn.functional.embedding(ids, self.embed.weight)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.square().mean()


@pytest.mark.parametrize("placement", ["scratch", "inplace"])
def test_weights_used_directly_leave_no_prefix(placement: str, rng: Any) -> None:
    def make() -> nn.Module:
        torch.manual_seed(rng.seed)
        return _Direct()

    ids = torch.arange(10)
    fewer, all_calls = same_with_and_without(
        make, lambda model: model(ids), blocks="all", placement=placement
    )
    assert fewer == [*all_calls[:2], all_calls[2] + 1], "skipped in the proof alone"
