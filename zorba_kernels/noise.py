"""Names and constants of the noise contract, and Philox4x32-10 in plain Python.

The contract is stated in ``docs/noise.md``; ``csrc/noise.h`` is its C++ and CUDA form and
``zorba_kernels/backends/reference.py`` the plain torch oracle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, get_args

NOISE_VERSION = 2
"""Version of the contract. It kept all values of version 1, and added the distribution rank1."""

Distribution = Literal["gaussian", "rademacher", "rank1"]
Rounding = Literal["nearest", "stochastic"]
DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)

DISTRIBUTION_CODES: dict[Distribution, int] = {"gaussian": 0, "rademacher": 1, "rank1": 2}
"""Codes of ``csrc/noise.h`` and ``zorba_kernels/kernels/noise.py``."""

VERSIONS: dict[Distribution, int] = {"gaussian": 1, "rademacher": 1, "rank1": 2}
"""Version that defined each distribution. Messages, logs and checkpoints carry that of theirs, so
that a package of an older version reads whatever it can make."""

ROW_DOMAIN, COLUMN_DOMAIN = 3 << 30, 2 << 30
"""Added to the block of the signs of rows and columns: a domain of their own below each sample."""

ROUNDING_DOMAIN = 1 << 31
"""``sample | ROUNDING_DOMAIN`` is the domain of rounding bits; samples are below it."""

BLOCK_ELEMENTS: dict[Distribution, int] = {"gaussian": 8, "rademacher": 128, "rank1": 128}
"""Elements (of rank1: rows, or columns) served by one Philox call."""

MAX_ELEMENTS = (1 << 32) * BLOCK_ELEMENTS["gaussian"]
"""A parameter may have no more: the block index is the 32-bit counter word 0."""

__all__ = [
    "BLOCK_ELEMENTS",
    "COLUMN_DOMAIN",
    "DISTRIBUTIONS",
    "MAX_ELEMENTS",
    "NOISE_VERSION",
    "ROUNDINGS",
    "ROUNDING_DOMAIN",
    "ROW_DOMAIN",
    "VERSIONS",
    "Distribution",
    "Rounding",
    "canonical_name",
    "philox4x32",
    "stream_of",
]

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_MASK32 = 0xFFFFFFFF


def canonical_name(name: str) -> str:
    """Returns a parameter's name without what wrappers put in front.

    ``torch.compile``, FSDP and activation checkpointing leave a component anywhere in the name;
    ``DataParallel`` leaves ``module.`` at its start.
    """
    # Only wrappers make these components, at any depth of the model.
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    # "module" is an ordinary name inside of a model: only at the start is it a wrapper's.
    while name.startswith("module."):
        name = name[len("module.") :]
    return name


def stream_of(name: str) -> int:
    """Returns the uint64 stream of a parameter: SHA-256 of its canonical name, first 8 bytes."""
    # A cryptographic hash, as neighbouring names must not give related streams.
    digest = hashlib.sha256(canonical_name(name).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def as_int64(value: int) -> int:
    """Returns the int64 with the bits of a uint64: torch has no arithmetic on the latter."""
    return value - (1 << 64) if value >= 1 << 63 else value


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

    Args:
        counter: four uint32.
        key: two uint32.

    Returns:
        Four uint32.

    Raises:
        ValueError: a wrong count, or a value outside uint32.
    """
    counts, words = (len(counter), len(key)), [int(v) for v in (*counter, *key)]
    if counts != (4, 2):
        raise ValueError(f"philox4x32 takes 4 counter words and 2 key words, got {counts}")
    if any(not 0 <= v <= _MASK32 for v in words):
        raise ValueError(f"philox4x32 words must be uint32, got {words[:4]} and {words[4:]}")
    # Python's integers do not wrap, which makes the high halves plain shifts.
    c0, c1, c2, c3, k0, k1 = words
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK32
        c2, c3 = (p0 >> 32) ^ c3 ^ k1, p0 & _MASK32
        # The key schedule of the paper: a Weyl sequence.
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3
