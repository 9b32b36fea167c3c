"""Tiny random models of many architectures, from configs alone: nothing is downloaded.

``CASES`` is the list that ``docs/models.md`` shows: a model type, the class that it is built with,
and the blocks that ``find_blocks`` must find.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

VOCABULARY = 100

SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "dim"), 32),
    **dict.fromkeys(("attention_hidden_size", "pooler_hidden_size", "projection_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 3),
    "encoder_layers": 3,
    **dict.fromkeys(("num_decoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "hidden_dim", "n_inner"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "d_kv", "rotary_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts"), 4),
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "initializer_range": 0.2,
    "image_size": 16,
    "patch_size": 8,
}
"""What every config gets, where it has such an attribute; those nested in it too."""


@dataclass(frozen=True)
class Case:
    kind: str  # its model_type
    auto: str  # the auto class that builds it, without AutoModel
    blocks: str  # lists of blocks that it has, as name:length
    # What its config needs besides SMALL; a dict for a config nested in it.
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind}-{self.auto}"

    @property
    def names(self) -> list[str]:
        lists = [item.split(":") for item in self.blocks.split()]
        return [f"{name}.{i}" for name, length in lists for i in range(int(length))]


_LLAMA = "model.layers:3"
_LIKE_LLAMA = (
    "llama mistral qwen2 qwen3 gemma gemma2 phi phi3 stablelm cohere cohere2 granite olmo olmo2 "
    "smollm3 starcoder2 glm4 ernie4_5 mixtral qwen3_moe olmoe"
)
_GPT = "transformer.h:3"
_PAIR = "model.encoder.layers:3 model.decoder.layers:2"
_T5 = "encoder.block:3 decoder.block:2"
_SSM = {"intermediate_size": 64, "state_size": 8, "time_step_rank": 2}


def _causal(kind: str, blocks: str = _LLAMA, **changes: Any) -> Case:
    return Case(kind, "ForCausalLM", blocks, changes)


def _classifier(kind: str, blocks: str, **changes: Any) -> Case:
    return Case(kind, "ForSequenceClassification", blocks, changes)


def _pair(kind: str, blocks: str = _PAIR, **changes: Any) -> Case:
    return Case(kind, "ForSeq2SeqLM", blocks, changes)


CASES = [
    *map(_causal, _LIKE_LLAMA.split()),
    _causal("gemma3_text", layer_types=[*["sliding_attention"] * 2, "full_attention"]),
    _causal("gpt_oss", sliding_window=4),
    _causal(
        "deepseek_v3",
        **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
        **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
        **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
        **dict.fromkeys(("n_routed_experts", "num_key_value_heads"), 4),
    ),
    _causal("gpt2", _GPT),
    _causal("gpt_neo", _GPT, attention_types=[[["global", "local", "global"], 1]]),
    *(_causal(kind, _GPT) for kind in ("gptj", "gpt_bigcode", "codegen", "bloom")),
    _causal("falcon", _GPT, ffn_hidden_size=64),
    _causal("gpt_neox", "gpt_neox.layers:3"),
    _causal("opt", "model.decoder.layers:3"),
    _causal("mpt", "transformer.blocks:3"),
    _causal("xglm"),
    _causal("mamba", "backbone.layers:3", **_SSM),
    _causal("falcon_mamba", "backbone.layers:3", **_SSM),
    _causal("mamba2", "backbone.layers:3", num_heads=8, n_groups=2, chunk_size=8, state_size=8),
    _causal("rwkv", "rwkv.blocks:3"),
    _causal("recurrent_gemma", lru_width=32, block_types=[*["recurrent"] * 2, "attention"]),
    _causal(
        "qwen3_next",
        layer_types=[*["linear_attention"] * 2, "full_attention"],
        **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
        **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    ),
    _causal(
        "jamba",
        **dict.fromkeys(("attn_layer_period", "expert_layer_period"), 2),
        **dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), 1),
        **dict.fromkeys(("mamba_d_state", "mamba_dt_rank"), 4),
    ),
    _classifier("bert", "bert.encoder.layer:3"),
    Case("bert", "ForMaskedLM", "bert.encoder.layer:3"),
    _classifier("roberta", "roberta.encoder.layer:3"),
    _classifier("xlm-roberta", "roberta.encoder.layer:3"),
    Case("modernbert", "ForMaskedLM", _LLAMA),
    _classifier("modernbert", _LLAMA),
    _classifier("deberta-v2", "deberta.encoder.layer:3"),
    _classifier("electra", "electra.encoder.layer:3", embedding_size=16),
    _classifier(
        "albert",
        "albert.encoder.albert_layer_groups:2",
        **{"embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": 2},
    ),
    _classifier("distilbert", "distilbert.transformer.layer:3"),
    _classifier("mpnet", "mpnet.encoder.layer:3"),
    _classifier(
        "funnel",
        "funnel.encoder.blocks.0:2 funnel.encoder.blocks.1:1",
        **{"block_sizes": [2, 1], "block_repeats": [1, 1], "d_head": 8, "d_inner": 64},
    ),
    _pair("t5", _T5, decoder_start_token_id=0),
    _pair("mt5", _T5),
    *map(_pair, ("bart", "mbart", "pegasus")),
    Case("vit", "ForImageClassification", "vit.layers:3"),
    Case(
        "swin",
        "ForImageClassification",
        "swin.encoder.layers.0.blocks:2 swin.encoder.layers.1.blocks:1",
        {"depths": [2, 1], "num_heads": [2, 4], "embed_dim": 16, "patch_size": 2, "window_size": 4},
    ),
    Case(
        "clip",
        "",
        "text_model.encoder.layers:2 vision_model.encoder.layers:3",
        {"text_config": {"num_hidden_layers": 2}},
    ),
    Case(
        "whisper",
        "ForSpeechSeq2Seq",
        _PAIR,
        {"max_source_positions": 10, "num_mel_bins": 8, "decoder_start_token_id": 2},
    ),
    Case(
        "wav2vec2",
        "ForCTC",
        "wav2vec2.encoder.layers:3",
        {"conv_dim": [8] * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
    ),
]


def case_of(kind: str) -> Case:
    return next(case for case in CASES if case.kind == kind)


def tiny_config(case: Case | str) -> Any:
    case = case_of(case) if isinstance(case, str) else case
    config = AutoConfig.for_model(case.kind)
    _shrink(config)
    config.pad_token_id = 0
    for key, value in case.changes.items():
        if isinstance(value, dict):
            for inner, inner_value in value.items():
                setattr(getattr(config, key), inner, inner_value)
        else:
            setattr(config, key, value)
    return config


def _shrink(config: Any) -> None:
    for key, value in SMALL.items():
        computed = isinstance(getattr(type(config), key, None), property)
        if type(getattr(config, key, None)) is type(value) and not computed:
            setattr(config, key, value)
    own = vars(config)
    if own.get("layer_types"):
        config.layer_types = config.layer_types[: SMALL["num_hidden_layers"]]
    for value in own.values():
        if hasattr(value, "model_type"):
            _shrink(value)


_built: dict[str, nn.Module] = {}  # a copy takes a tenth of the time of building


def build(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns a model of random weights in evaluation mode, the same at every call."""
    if repr(case) not in _built:
        torch.manual_seed(0)
        auto = getattr(transformers, f"AutoModel{case.auto}")
        _built[repr(case)] = auto.from_config(tiny_config(case)).eval()
    return copy.deepcopy(_built[repr(case)]).to(dtype)


def loss_of(model: nn.Module, case: Case) -> Tensor:
    """Returns a float32 loss of one small batch, always the same."""
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=generator)
    pixels = torch.randn(2, 3, 16, 16, generator=generator).to(dtype)
    sound = torch.randn(2, 8, 20, generator=generator).to(dtype)
    two = torch.tensor([0, 1])
    if case.auto == "ForCTC":
        return model(input_values=sound.reshape(2, -1).repeat(1, 8), labels=ids[:, :1]).loss.float()
    if case.auto == "ForSpeechSeq2Seq":
        logits, labels = model(input_features=sound, labels=ids).logits, ids
    elif case.auto == "ForSeq2SeqLM":
        logits, labels = model(input_ids=ids, labels=ids).logits, ids
    elif case.auto == "ForSequenceClassification":
        logits, labels = model(input_ids=ids).logits, two
    elif case.auto == "ForImageClassification":
        logits, labels = model(pixel_values=pixels).logits, two
    elif case.kind == "clip":
        logits, labels = model(pixel_values=pixels, input_ids=ids).logits_per_image, two
    else:
        logits, labels = model(input_ids=ids).logits, ids
    return nn.functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten())
