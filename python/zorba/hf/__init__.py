"""What connects Hugging Face models to the optimizer and the federation."""

from zorba.blocks import Block, find_blocks
from zorba.hf.head import HeadError, narrow_logits
from zorba.hf.label_words import LabelWordBatch, LabelWordLoss
from zorba.hf.prefix import Prefix, extend_prefix, run_prefix, run_suffix

__all__ = [
    "Block",
    "HeadError",
    "LabelWordBatch",
    "LabelWordLoss",
    "Prefix",
    "extend_prefix",
    "find_blocks",
    "narrow_logits",
    "run_prefix",
    "run_suffix",
]
