"""Noise in the forward of every text architecture: right, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zorba import ZerothOrderSGD

from tests.hf.test_own_directions import assert_close_scalars
from tests.hf.tiny import CASES, VOCABULARY, Case, build, case_of
from tests.optim.models import same_bits, snapshot

REFUSED = {
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), r"dt_proj.*read outside of the forward"),
    "mamba2": r"'backbone.layers.0.mixer.norm' .*does not compute row by row",
    "rwkv": r"attention.output.weight.*read outside of the forward",
    "qwen3_next": r"'model.layers.0.linear_attn.norm' .*saw rows \(48, 8\) of a batch of 4",
}
"""Models whose layers do not have the batch's rows, and what they are told."""

HEADS = ("ForCausalLM", "ForMaskedLM", "ForSequenceClassification", "ForSeq2SeqLM")
TEXT = [case for case in CASES if case.auto in HEADS]


def text_losses(model: nn.Module, case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (4, 6), generator=generator)
    labels = {"labels": ids} if case.auto == "ForSeq2SeqLM" else {}
    logits = model(input_ids=ids, **labels).logits.float()
    wanted = torch.tensor([0, 1, 0, 1]) if case.auto == "ForSequenceClassification" else ids
    losses = nn.functional.cross_entropy(logits.movedim(-1, 1), wanted, reduction="none")
    return losses.reshape(4, -1).mean(1)


def one_step(model: nn.Module, placement: str, losses: Callable[[], Tensor]) -> ZerothOrderSGD:
    optimizer = ZerothOrderSGD(
        model, 1e-3, eps=1e-2, placement=placement, directions="own", distribution="rank1",
        examples_per_direction=2,
    )  # fmt: skip
    optimizer.step(losses)
    return optimizer


def assert_fused_is_scratch(start: nn.Module, losses: Callable[[nn.Module], Tensor]) -> None:
    """Of the parameters that the fused placement trains."""
    for p in start.parameters():  # some start near zero, where any noise would be lost
        p.data.add_(0.1 * torch.randn_like(p))
    fused, scratch = copy.deepcopy(start), copy.deepcopy(start)
    one = one_step(fused, "fused", lambda: losses(fused))
    for name, p in scratch.named_parameters():
        p.requires_grad_(name in one.placement.table.names)
    other = one_step(scratch, "scratch", lambda: losses(scratch))
    assert len(other.last_step.scalars) == 2
    assert min(map(abs, other.last_step.scalars)) > 0
    assert_close_scalars(one.last_step.scalars, other.last_step.scalars)


@pytest.mark.filterwarnings("ignore:placement='fused' cannot", "ignore:the first evaluation")
@pytest.mark.parametrize("case", TEXT, ids=str)
def test_every_architecture_is_right_or_refused(case: Case) -> None:
    torch.manual_seed(0)
    model = build(case)
    if case.kind not in REFUSED:
        assert_fused_is_scratch(model, lambda model: text_losses(model, case))
        return
    before = snapshot(model)
    with pytest.raises(ValueError, match=REFUSED[case.kind]):
        one_step(model, "fused", lambda: text_losses(model, case))
    assert same_bits(model, before)


OPT = case_of("opt")
OLDER = {"do_layer_norm_before": False, "word_embed_proj_dim": 16}  # as OPT-350m


@pytest.mark.filterwarnings("ignore:placement='fused' cannot", "ignore:the first evaluation")
@pytest.mark.parametrize("trained", ["", "fc1", "fc2.bias", "final_layer_norm", "q_proj"])
@pytest.mark.parametrize("changes", [{}, OLDER], ids=["newer", "older"])
def test_opt_flattens_rows_and_tokens(changes: dict[str, Any], trained: str) -> None:
    """The rows are those of the layer, also where no other layer has seen them."""
    torch.manual_seed(0)
    case = Case(OPT.kind, OPT.auto, OPT.blocks, changes)
    model = build(case)
    for name, p in model.named_parameters():
        p.requires_grad_(".layers." in name and trained in name)
    assert_fused_is_scratch(model, lambda model: text_losses(model, case))


def test_opt_of_another_kind_is_refused() -> None:
    """What a layer of one's own does is not known."""
    from transformers.models.opt.modeling_opt import OPTDecoderLayer

    class Mine(OPTDecoderLayer):
        pass

    model = build(OPT)
    for layer in model.model.decoder.layers:
        layer.__class__ = Mine
    model.model.decoder.embed_tokens.requires_grad_(False)
    model.model.decoder.embed_positions.requires_grad_(False)
    with pytest.raises(ValueError, match=r"final_layer_norm.*saw rows \(24, 32\)"):
        one_step(model, "fused", lambda: text_losses(model, OPT))
