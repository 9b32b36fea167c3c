"""What the weights of a model take, from its config alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zorba.blocks import find_blocks
from zorba.tables import padded_bytes


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model's weights.

    Attributes:
        name: of the model.
        dtype: of the weights.
        block_names: as ``find_blocks`` tells them.
        blocks: bytes of each block.
        padded: bytes of each block in a buffer, where every parameter is aligned.
        rest: bytes outside of the blocks: embeddings, norms, head, buffers of modules.
        scratch: of each block, bytes of the parameters of its largest module: what perturbed
            weights take while the block is active.
    """

    name: str
    dtype: str
    block_names: tuple[str, ...]
    blocks: tuple[int, ...]
    padded: tuple[int, ...]
    rest: int
    scratch: tuple[int, ...]

    @property
    def total(self) -> int:
        """Bytes of the whole model."""
        return self.rest + sum(self.blocks)


def read_config(model: str | Path) -> Any:
    """Returns the config of a causal language model: a folder, a config.json, or a hub name.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoConfig

    path = Path(model)
    try:
        return AutoConfig.from_pretrained(str(path.parent if path.name == "config.json" else model))
    except (OSError, ValueError) as error:
        raise ValueError(f"{model} has no config of a model: {error}") from error


def make_model(config: Any, dtype: str, device: str = "cpu") -> nn.Module:
    """Returns a causal language model of random weights; on device "meta" it takes no memory."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.device(device):
        model: nn.Module = auto.from_config(config, dtype=getattr(torch, dtype))
    return model.eval().requires_grad_(False)


def footprint_of(config: Any, dtype: str) -> Footprint:
    """Returns the bytes of a model's weights, without making them.

    Args:
        config: of a causal language model of transformers.
        dtype: of the weights: "float32", "bfloat16" or "float16".

    Raises:
        ValueError: the model has no transformer blocks.
    """
    model = make_model(config, dtype, "meta")
    blocks = find_blocks(model)
    total = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    sizes = tuple(block.nbytes for block in blocks)
    return Footprint(
        name=str(getattr(config, "_name_or_path", "") or config.model_type),
        dtype=dtype,
        block_names=tuple(block.name for block in blocks),
        blocks=sizes,
        padded=tuple(sum(map(padded_bytes, block.module.parameters())) for block in blocks),
        rest=total - sum(sizes),
        scratch=tuple(max(map(_own_bytes, block.module.modules())) for block in blocks),
    )


def _own_bytes(module: nn.Module) -> int:
    return sum(padded_bytes(p) for p in module.parameters(recurse=False))
