"""Program: the linear combination of noises that one pass adds, checked and normalised."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from zorba_kernels.noise import DISTRIBUTIONS, ROUNDING_DOMAIN, ROUNDINGS, Distribution, Rounding


@dataclass(frozen=True, eq=False)
class Program:
    """Rounds of terms; every field is on the CPU, and none changes.

    Attributes:
        seeds: uint64 of each term, [terms].
        samples: uint32 below 2**31 of each term, [terms].
        coefs: float32 [groups, terms].
        decays: float32 [groups, rounds].
        round_ends: index one past each round's last term, [rounds].
        rounding_seeds: uint64 of each round, [rounds].
        distribution: of every term.
        rounding: of every round.
    """

    seeds: tuple[int, ...]
    samples: tuple[int, ...]
    coefs: Tensor
    decays: Tensor
    round_ends: tuple[int, ...]
    rounding_seeds: tuple[int, ...]
    distribution: Distribution
    rounding: Rounding


def make_program(
    seeds: int | Sequence[int],
    coefs: float | Sequence[float] | Sequence[Sequence[float]] | Tensor,
    num_groups: int,
    distribution: str,
    rounding: str,
    rounding_seed: int | Sequence[int] | None,
    samples: int | Sequence[int] | None,
    rounds: Sequence[int] | None,
    decay: float | Sequence[float] | Tensor | None = None,
) -> Program:
    """Checks the arguments of ``add_noise_`` (see there) and returns them in one shape."""
    check_choice("distribution", distribution, DISTRIBUTIONS)
    check_choice("rounding", rounding, ROUNDINGS)
    seed_list = _seeds(seeds, "seed")
    terms = len(seed_list)
    sample_list = [0] * terms if samples is None else [check_sample(s) for s in _as_list(samples)]
    if len(sample_list) != terms:
        raise ValueError(f"{terms} seeds but {len(sample_list)} samples")
    lengths = [terms] if rounds is None else [integer(n, "terms of a round") for n in rounds]
    if any(n < 0 for n in lengths) or sum(lengths) != terms:
        raise ValueError(f"rounds {lengths} must be terms per round and add up to {terms} seeds")
    ends = list(itertools.accumulate(lengths))
    return Program(
        seeds=tuple(seed_list),
        samples=tuple(sample_list),
        coefs=_coefs(coefs, num_groups, terms),
        decays=_decays(decay, num_groups, len(lengths)),
        round_ends=tuple(ends),
        rounding_seeds=_rounding_seeds(rounding_seed, seed_list, ends),
        distribution=cast(Distribution, distribution),
        rounding=cast(Rounding, rounding),
    )


def check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless value is one of choices."""
    if value not in choices:
        raise ValueError(f"{what} is {value!r}; expected one of {', '.join(choices)}")


def check_uint64(value: int, what: str) -> int:
    """Returns value as an int, or raises ValueError when it is no uint64."""
    number = integer(value, what)
    if not 0 <= number < 1 << 64:
        raise ValueError(f"{what} must be in [0, 2**64), got {number}")
    return number


def check_sample(value: int) -> int:
    """Returns value as an int, or raises ValueError when it is no sample."""
    number = integer(value, "sample")
    if not 0 <= number < ROUNDING_DOMAIN:
        raise ValueError(f"sample must be in [0, 2**31), got {number}")
    return number


def integer(value: int, what: str) -> int:
    """Returns value as an int, or raises TypeError when it is no integer."""
    try:
        return value.__index__()
    except AttributeError:
        raise TypeError(f"{what} must be an integer, got {value!r}") from None


def _as_list(value: int | Sequence[int]) -> list[int]:
    if isinstance(value, Tensor):
        return list(value.reshape(-1).tolist())
    return list(value) if isinstance(value, Iterable) else [value]


def _seeds(value: int | Sequence[int], what: str) -> list[int]:
    """uint64 values; a tensor holds their bits, as torch has no arithmetic on uint64."""
    if isinstance(value, Tensor) and value.dtype == torch.int64:
        return [v % (1 << 64) for v in _as_list(value)]
    return [check_uint64(s, what) for s in _as_list(value)]


def _coefs(
    coefs: float | Sequence[float] | Sequence[Sequence[float]] | Tensor, groups: int, terms: int
) -> Tensor:
    matrix = torch.as_tensor(coefs, dtype=torch.float64).detach().cpu()
    if matrix.ndim == 0:
        matrix = matrix.reshape(1)
    if matrix.ndim == 1:
        matrix = matrix.unsqueeze(0).expand(groups, -1)
    if matrix.ndim != 2 or matrix.shape != (groups, terms):
        raise ValueError(
            f"coefs has shape {tuple(torch.as_tensor(coefs).shape)}; expected [{terms}] (one a "
            f"seed) or [{groups}, {terms}] (one a group and seed)"
        )
    return _finite(matrix, "coefs")


def _decays(decay: float | Sequence[float] | Tensor | None, groups: int, rounds: int) -> Tensor:
    if decay is None:
        return torch.zeros(groups, rounds)
    matrix = torch.as_tensor(decay, dtype=torch.float64).detach().cpu()
    if matrix.ndim == 1:
        matrix = matrix.unsqueeze(1)
    try:
        full = matrix.expand(groups, rounds)
    except RuntimeError:
        raise ValueError(
            f"decay has shape {tuple(torch.as_tensor(decay).shape)}; expected a number, [{groups}] "
            f"(one a group) or [{groups}, {rounds}] (one a group and round)"
        ) from None
    return _finite(full, "decay")


def _finite(matrix: Tensor, what: str) -> Tensor:
    narrow = matrix.to(torch.float32).contiguous()
    if not bool(torch.isfinite(narrow).all()):
        bad = matrix[~torch.isfinite(narrow)][0].item()
        raise ValueError(f"{what} must be finite float32 numbers, got {bad}")
    # A subnormal counts as zero: whether a term is skipped must not depend on the flush mode.
    return torch.where(narrow.abs() < torch.finfo(torch.float32).tiny, 0.0, narrow)


def _rounding_seeds(
    given: int | Sequence[int] | None, seeds: list[int], ends: list[int]
) -> tuple[int, ...]:
    """One a round; by default the round's first seed, whose rounding domain nothing else uses."""
    if given is not None:
        out = _seeds(given, "rounding_seed")
        if len(out) != len(ends):
            raise ValueError(f"{len(ends)} rounds but {len(out)} rounding seeds")
        return tuple(out)
    starts = [0, *ends][: len(ends)]
    return tuple(seeds[a] if a < b else 0 for a, b in zip(starts, ends, strict=True))
