"""How much each benchmark does: on a GPU, on a CPU, and in a rehearsal; and the weights for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def squares(count: int, side: int) -> Shapes:
    return {f"layers.{i}.weight": (side, side) for i in range(count)}


def llama_config(layers: int, hidden: int, inner: int, vocabulary: int, **more: Any) -> Any:
    """Returns a ``LlamaConfig``, by default with heads of 64 or 128 and no grouped queries."""
    from transformers import LlamaConfig

    heads = {"num_attention_heads": max(1, hidden // (128 if hidden >= 4096 else 64))}
    heads["num_key_value_heads"] = heads["num_attention_heads"]
    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner}
    return LlamaConfig(num_hidden_layers=layers, **sizes, **(heads | more))


def smollm_config() -> Any:
    grouped = {"num_attention_heads": 9, "num_key_value_heads": 3}
    return llama_config(30, 576, 1536, 49152, tie_word_embeddings=True, **grouped)


def random_llama(config: Any, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """Returns a model in evaluation mode; time and memory do not depend on its values."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


def shapes_of(config: Any) -> Shapes:
    model = random_llama(config, torch.bfloat16, "meta")
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def flat_weights(
    shapes: Shapes, device: torch.device, like: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns bf16 weights in one piece of memory, random or those of ``like``, and their views."""
    counts = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    flat = torch.empty(sum(counts.values()), dtype=torch.bfloat16, device=device)
    if like is not None:
        flat.copy_(like)
    else:
        for piece in flat.split(1 << 30):
            piece.normal_(0.0, 0.02)
    pieces = flat.split(list(counts.values()))
    return flat, {n: p.view(shapes[n]) for n, p in zip(counts, pieces, strict=True)}


def count_of(weights: int) -> str:
    """Returns a number of weights as people say it."""
    if weights < 1e6:
        return f"{weights:,}"
    return f"{weights / 1e9:.1f} B" if weights >= 1e9 else f"{weights / 1e6:.3g} M"


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements, shapes of bf16 tables, numbers of runs."""

    elements: int  # that noise is compared at, from index 0 on, for each seed
    chunk: int  # elements at a time between two backends of the device
    chunk_other: int  # elements at a time against the cpu and reference backends
    least_other: int  # elements that those two must reach, whatever time is left
    seeds: Mapping[str, int]  # that noise is compared for, by distribution
    weights: tuple[tuple[int, ...], ...]  # shapes that are compared, for each dtype
    runs: int  # of every call that is timed
    tables: Mapping[str, Callable[[], Shapes]]  # that one pass goes over, by title
    compared: tuple[str, ...]  # titles of those that other implementations go over too
    step: Callable[[], Shapes]  # that the passes of a step go over
    many_seeds: Callable[[], Shapes]  # that 64 seeds go over
    batches: tuple[tuple[int, int], ...]  # rows and tokens that a perturbed layer gets
    layers: tuple[tuple[int, int], ...]  # inputs and outputs of such layers
    calls: int  # small calls whose cost to the host is measured
    offload: Callable[[], Any]  # LlamaConfig of the model whose idle blocks are on the host
    offload_active: int  # number of its active blocks
    compiler: str = "inductor"  # backend of torch.compile


GPU = Sizes(
    elements=1 << 35,
    chunk=1 << 32,
    chunk_other=1 << 26,
    least_other=1 << 31,
    # 8 Gaussian seeds show every backend each of the 2**32 words 32 times on average, so all of
    # them; 16 Rademacher seeds over all 2**35 indices, 128 a counter, make 2**32 counters. Rank-one
    # noise has the counters of its rows and columns alone: one seed for each kind of row.
    seeds={"gaussian": 8, "rademacher": 16, "rank1": 5},
    weights=((8192, 8192), (4097, 4099), (1_000_003,), (7,)),
    runs=20,
    # Far larger than any L2 cache, so that every pass finds its weights in memory.
    tables={
        "matrices of 4096 x 4096": lambda: squares(128, 4096),
        "shaped like a 7B model": lambda: shapes_of(llama_config(32, 4096, 11008, 32000)),
    },
    compared=("matrices of 4096 x 4096",),
    step=lambda: shapes_of(llama_config(40, 5120, 13824, 32000)),
    many_seeds=lambda: squares(16, 4096),
    batches=((8, 128), (8, 2048), (64, 128), (64, 2048)),
    layers=((2048, 2048), (4096, 4096), (4096, 11008)),
    calls=2000,
    offload=lambda: llama_config(24, 2048, 5632, 256),
    offload_active=6,
)

REHEARSAL = Sizes(
    elements=1 << 14,
    chunk=1 << 13,
    chunk_other=1 << 12,
    least_other=1 << 13,
    seeds={"gaussian": 2, "rademacher": 2, "rank1": 5},
    weights=((64, 64), (31, 33), (7,)),
    runs=3,
    tables={"matrices of 64 x 64": lambda: squares(3, 64)},
    compared=("matrices of 64 x 64",),
    step=lambda: shapes_of(llama_config(2, 64, 96, 128)),
    many_seeds=lambda: squares(2, 64),
    batches=((2, 3), (3, 5)),
    layers=((64, 96), (70, 33)),
    calls=5,
    offload=lambda: llama_config(4, 64, 96, 256),
    offload_active=1,
    compiler="eager",
)

CPU = replace(
    REHEARSAL,
    runs=15,
    # Twice, because MeZO's temporaries depend on the tensors: those of the small matrices stay in
    # the cache; each of the large ones is mapped anew.
    tables={
        "matrices of 1000 x 1000": lambda: squares(100, 1000),
        "matrices of 4096 x 4096": lambda: squares(6, 4096),
    },
    compared=("matrices of 1000 x 1000", "matrices of 4096 x 4096"),
    step=lambda: shapes_of(smollm_config()),
    many_seeds=lambda: squares(10, 1000),
    calls=2000,
    offload=smollm_config,
    offload_active=8,
    compiler="inductor",
)
