"""Adapters as the active set: ``get_peft_model`` and ZerothOrderSGD know nothing of each other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zorba import ZerothOrderSGD
from zorba.hf import find_blocks

from tests.hf.steps import changed, check_step, state_of
from tests.hf.tiny import VOCABULARY, build, case_of
from tests.tolerances import bound

peft = pytest.importorskip("peft", reason="peft is in the test extra")

EPS = 2**-6
TASKS = {
    "CAUSAL_LM": (case_of("llama"), ["q_proj", "v_proj"]),
    "SEQ_CLS": (case_of("bert"), ["query", "value"]),
}
PROMPT = {"num_virtual_tokens": 3}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 2, "lora_alpha": 4}),
    "dora": ("LoraConfig", {"r": 2, "use_dora": True}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "prefix": ("PrefixTuningConfig", PROMPT),
    "prefix-projected": (
        "PrefixTuningConfig",
        {**PROMPT, "prefix_projection": True, "encoder_hidden_size": 16},
    ),
    "prompt": ("PromptTuningConfig", PROMPT),
}


def adapted(task: str, adapter: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    case, targets = TASKS[task]
    name, options = ADAPTERS[adapter]
    if name in ("LoraConfig", "IA3Config"):
        options = {**options, "target_modules": targets}
    config = getattr(peft, name)(task_type=task, **options)
    model: nn.Module = peft.get_peft_model(build(case), config)
    return model.to(dtype).eval()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (2, 6), generator=generator), torch.tensor([0, 1])


def loss_of(model: nn.Module) -> Tensor:
    ids, two = batch()
    logits = model(input_ids=ids).logits.float()
    if logits.ndim == 2:
        return nn.functional.cross_entropy(logits, two)
    return nn.functional.cross_entropy(logits[:, -6:].flatten(0, 1), ids.flatten())


# PEFT 0.21 looks for an argument that transformers 5.24 renamed, and refuses prefixes of encoders.
SERVED = [
    (task, adapter)
    for task in TASKS
    for adapter in ADAPTERS
    if task == "CAUSAL_LM" or not adapter.startswith("prefix")
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("task", "adapter"), SERVED)
def test_a_step_moves_the_adapter_alone(task: str, adapter: str, dtype: torch.dtype) -> None:
    """``check_step`` compares every weight and buffer: only those that require a gradient move."""
    model = adapted(task, adapter, dtype)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert 0 < len(trained) < len(list(model.parameters()))
    check_step(model, loss_of, lr=1e-2, eps=EPS)


@pytest.mark.parametrize("estimator", ["central", "forward"])
def test_own_directions_of_an_adapter(estimator: str) -> None:
    """LoRA's layers are linear ones: noise in the forward is that of a forward a direction."""
    ids = torch.randint(3, VOCABULARY, (5, 6), generator=torch.Generator().manual_seed(1))
    start, found = adapted("CAUSAL_LM", "lora"), []
    for placement in ("fused", "scratch"):
        model = copy.deepcopy(start)
        before = state_of(model)
        with torch.no_grad():
            for name, p in model.named_parameters():
                # They start at zero: half of the noise would have no effect.
                if "lora_B" in name:
                    p.fill_(0.1)
        optimizer = ZerothOrderSGD(
            model, lr=1e-2, eps=EPS, estimator=estimator, placement=placement, directions="own",
            distribution="rank1", examples_per_direction=2,
        )  # fmt: skip
        for _ in range(2):
            optimizer.step(lambda: losses_of(model, ids))  # noqa: B023
            found.append(optimizer.last_step.scalars)
        assert all(".lora_" in name for name in changed(model, before))
    for fused, scratch in zip(found[:2], found[2:], strict=True):
        largest = max(map(abs, scratch))
        assert largest > 0
        assert len(fused) == 3
        for g, h in zip(fused, scratch, strict=True):
            assert abs(g - h) <= bound("fused scalar") * largest


def losses_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1].float().transpose(1, 2)
    return nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").mean(1)


@pytest.mark.parametrize("task", TASKS)
def test_a_merged_model_gives_the_same_outputs(task: str) -> None:
    model = adapted(task, "lora")
    plain = copy.deepcopy(model)
    optimizer = ZerothOrderSGD(model, lr=1e-2, eps=EPS)
    for _ in range(3):
        optimizer.step(lambda: loss_of(model))
    ids, _ = batch()
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        merged = copy.deepcopy(model).merge_and_unload()(input_ids=ids).logits
        start = plain(input_ids=ids).logits
    limit = bound("merged adapter")
    torch.testing.assert_close(merged, trained, rtol=limit, atol=limit)
    assert (start - trained).abs().max() > 10 * limit, "the steps must show in the outputs"


def test_the_adapters_of_the_last_block_alone() -> None:
    model = adapted("CAUSAL_LM", "lora")
    before = state_of(model)
    ZerothOrderSGD(model, lr=1e-2, eps=EPS, blocks="last:1").step(lambda: loss_of(model))
    last = find_blocks(model)[-1]
    moved = changed(model, before)
    assert moved == [n for n in last.parameters if ".lora_" in n]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("adapter", "prefix"), [("lora", "base_model.model."), ("prefix", "base_model.")]
)
def test_blocks_are_those_of_the_base_model(task: str, adapter: str, prefix: str) -> None:
    blocks = find_blocks(adapted(task, adapter))
    assert [block.name for block in blocks] == [prefix + name for name in TASKS[task][0].names]
