"""NoiseTerms: which seeded noises to add to the weights, and how much of each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseTerms:
    """A linear combination of noises, ``sum_k coefs[group, k] * z(seeds[k], samples[k])``.

    Attributes:
        seeds: uint64 of each term.
        samples: which perturbation of its seed each term is.
        coefs: float32 [groups, terms] on the CPU; a row of zeros leaves its group alone.
    """

    seeds: tuple[int, ...]
    samples: tuple[int, ...]
    coefs: Tensor

    def __post_init__(self) -> None:
        """Checks that the parts belong together."""
        terms = len(self.seeds)
        if len(self.samples) != terms or self.coefs.ndim != 2 or self.coefs.shape[1] != terms:
            raise ValueError(
                f"{terms} seeds, {len(self.samples)} samples and coefs of shape "
                f"{tuple(self.coefs.shape)}; expected [groups, {terms}]"
            )

    @staticmethod
    def none(groups: int) -> NoiseTerms:
        """No noise at all."""
        return NoiseTerms((), (), torch.zeros(groups, 0))

    @staticmethod
    def single(seed: int, sample: int, coefs: Sequence[float] | Tensor) -> NoiseTerms:
        """One noise; ``coefs`` has one number a group."""
        column = torch.as_tensor(coefs, dtype=torch.float32).reshape(-1, 1)
        return NoiseTerms((seed,), (sample,), column)

    def plus(self, other: NoiseTerms) -> NoiseTerms:
        """This combination followed by another, in that order."""
        # Equal noises are not merged: kernels add in the order of terms, and bits depend on it.
        return NoiseTerms(
            self.seeds + other.seeds,
            self.samples + other.samples,
            torch.cat([self.coefs, other.coefs], dim=1),
        )

    def active(self, group: int) -> bool:
        """Whether the group's weights change at all."""
        return bool((self.coefs[group] != 0).any())


def step_seed(seed: int, step: int) -> int:
    """Returns the uint64 seed of a step: SHA-256 of (seed, step), first 8 bytes."""
    # Hashed, not seed + step: runs of neighbouring seeds would share all directions but one.
    digest = hashlib.sha256(f"zorba step {seed} {step}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
