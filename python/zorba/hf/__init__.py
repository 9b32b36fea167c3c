"""What connects Hugging Face models to the optimizer and the federation."""

from zorba.hf.blocks import Block, find_blocks
from zorba.hf.prefix import Prefix, extend_prefix, run_prefix, run_suffix

__all__ = ["Block", "Prefix", "extend_prefix", "find_blocks", "run_prefix", "run_suffix"]
