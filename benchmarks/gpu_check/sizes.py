"""How much each stage does: on a GPU, and in a rehearsal on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Shapes = dict[str, tuple[int, ...]]


def squares(count: int, side: int) -> Shapes:
    """Square matrices."""
    return {f"layers.{i}.weight": (side, side) for i in range(count)}


def llama(layers: int, hidden: int, inner: int, vocabulary: int) -> Shapes:
    """The parameters of a Llama model without grouped queries."""
    shapes: Shapes = {"embed_tokens": (vocabulary, hidden)}
    for i in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"layers.{i}.{name}"] = (hidden, hidden)
        for name in ("gate_proj", "up_proj"):
            shapes[f"layers.{i}.{name}"] = (inner, hidden)
        shapes[f"layers.{i}.down_proj"] = (hidden, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"layers.{i}.{name}"] = (hidden,)
    return shapes | {"norm": (hidden,), "lm_head": (vocabulary, hidden)}


class Sizes(NamedTuple):
    """Numbers of elements, shapes of tables, numbers of runs."""

    # identity of noise
    elements: int  # that z is compared at, from index 0 on, for each seed
    chunk: int  # at a time between two backends of the device
    chunk_other: int  # at a time against the cpu and reference backends
    least_other: int  # elements that those two must reach, whatever time is left
    seeds: dict[str, int]
    # identity of weights
    weights: list[tuple[int, ...]]  # for each dtype
    # measurements
    runs: int
    matrices: Callable[[], Shapes]
    model_7b: Callable[[], Shapes]
    model_13b: Callable[[], Shapes]
    many_seeds: Callable[[], Shapes]
    calls: int
    # steps with idle blocks on the host: layers, width, inner width
    offload: tuple[int, int, int]


# 8 Gaussian seeds show every backend each of the 2**32 words 32 times on average, so all of them;
# 16 Rademacher seeds over all 2**35 indices, 128 a counter, make 2**32 counters.
FULL = Sizes(
    elements=1 << 35,
    chunk=1 << 32,
    chunk_other=1 << 26,
    least_other=1 << 31,
    seeds={"gaussian": 8, "rademacher": 16},
    weights=[(8192, 8192), (4097, 4099), (1_000_003,), (7,)],
    runs=20,
    matrices=lambda: squares(128, 4096),
    model_7b=lambda: llama(32, 4096, 11008, 32000),
    model_13b=lambda: llama(40, 5120, 13824, 32000),
    many_seeds=lambda: squares(16, 4096),
    calls=2000,
    offload=(24, 2048, 5632),
)

SMALL = Sizes(
    elements=1 << 14,
    chunk=1 << 13,
    chunk_other=1 << 12,
    least_other=1 << 13,
    seeds={"gaussian": 2, "rademacher": 2},
    weights=[(64, 64), (31, 33), (7,)],
    runs=3,
    matrices=lambda: squares(3, 64),
    model_7b=lambda: llama(2, 64, 96, 128),
    model_13b=lambda: llama(2, 64, 96, 128),
    many_seeds=lambda: squares(2, 64),
    calls=5,
    offload=(4, 64, 96),
)
