"""A model of a few thousand weights with a tokenizer, on disk, and rows that it can be tuned on."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PLAIN = ["a", "good", "film", "and", "It", "was", "bad", "dull", "fine", "terrible", "great"]
ROWS = [
    {"sentence": f"a {word} film{more}", "label": label}
    for label, words in (("negative", ("bad", "dull")), ("positive", ("good", "fine")))
    for word in words
    for more in ("", " and a film")
]


def save_tiny_llama(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes a Llama of 2 blocks, the same in every run, and returns the folder."""
    names = ["<pad>", "</s>", "<unk>", *PLAIN, *(f" {word}" for word in PLAIN)]
    core = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = Split(Regex(r" ?[^ .]+|\."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(names), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder
