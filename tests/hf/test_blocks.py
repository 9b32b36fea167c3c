"""Blocks of tiny random models of many architectures, and prefixes in front of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from zorba.hf import extend_prefix, find_blocks, run_prefix, run_suffix

SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "encoder_layers"), 3),
    **dict.fromkeys(("num_decoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    "vocab_size": 100,
    "pad_token_id": 0,
}

DECODERS = (
    "llama qwen2 qwen3 gemma3_text phi mistral mixtral olmo2 smollm3 gpt_neox bloom falcon opt "
    "gpt2 mamba"
)
ENCODERS = "bert roberta modernbert deberta-v2 electra vit"
PAIRS = "t5 bart whisper"


def tiny_config(name: str) -> Any:
    config = AutoConfig.for_model(name)
    for key, value in {**SMALL, "layer_types": ["full_attention"] * 3}.items():
        computed = isinstance(getattr(type(config), key, None), property)
        if getattr(config, key, None) is not None and not computed:
            setattr(config, key, value)
    return config


@pytest.mark.parametrize("name", (DECODERS + " " + ENCODERS).split())
def test_blocks_of_one_stack(name: str) -> None:
    blocks = find_blocks(AutoModel.from_config(tiny_config(name)))
    assert len(blocks) == 3
    assert len({type(block.module) for block in blocks}) == 1
    assert [block.name.rsplit(".", 1)[1] for block in blocks] == ["0", "1", "2"]


@pytest.mark.parametrize("name", PAIRS.split())
def test_blocks_of_encoder_and_decoder(name: str) -> None:
    blocks = find_blocks(AutoModel.from_config(tiny_config(name)))
    assert [block.name.split(".")[0] for block in blocks] == ["encoder"] * 3 + ["decoder"] * 2


def test_names_are_those_of_the_whole_model() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    names = set(dict(model.named_parameters()))
    for block in find_blocks(model):
        assert set(block.parameters) <= names
        assert block.numel == sum(p.numel() for p in block.module.parameters())


def test_wrappers_do_not_show_in_names() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    wrapped = nn.DataParallel(model)
    assert [b.name for b in find_blocks(wrapped)] == [b.name for b in find_blocks(model)]


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no transformer blocks"):
        find_blocks(nn.Linear(3, 3))


@pytest.mark.parametrize("door", [0, 1, 2])
def test_prefix_and_suffix_equal_the_whole_forward(door: int, generator: torch.Generator) -> None:
    """Row by row and unpadded, the model gives the logits that the padded, cut run gives."""
    model = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    lengths = [3, 7, 5]
    rows = [torch.randint(1, 100, (n,), generator=generator).tolist() for n in lengths]
    blocks = [block.module for block in find_blocks(model)]
    head = model.get_output_embeddings().weight.detach()[[5, 9]]
    with torch.no_grad():
        prefix = run_prefix(model, blocks[door], rows, [0, 1, 0])
        logits = run_suffix(prefix, blocks[door:], model.model.norm, head)
        if door == 0:
            later = run_suffix(
                extend_prefix(prefix, blocks[:2]), blocks[2:], model.model.norm, head
            )
            assert torch.equal(later, logits)
        for row, mine in zip(rows, logits, strict=True):
            whole = model(torch.tensor([row])).logits[0, -1, [5, 9]]
            # Padding changes the shapes of matrix products, so the order of float32 sums.
            torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-5)


def test_a_block_that_is_never_reached_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    with pytest.raises(ValueError, match="never reached"):
        run_prefix(model, nn.Linear(2, 2), [[1, 2]], [0])


def test_prefix_of_mixed_layer_types_is_refused() -> None:
    """Gemma 3 hands sliding and full layers different masks: one prefix cannot serve both."""
    config = tiny_config("gemma3_text")
    config.layer_types = ["sliding_attention", "full_attention", "full_attention"]
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="several types"):
        run_prefix(model, find_blocks(model)[1].module, [[1, 2]], [0])
