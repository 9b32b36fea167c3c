"""Patterns: which noises an entry adds, relative to its number.

Nearly every step adds samples 0 to P - 1 of its own seed, or with momentum those of the last few
steps as well; a round of a federation adds the samples of a few seeds that nobody can guess. All
of these are runs: ranges of samples, of one seed or of the seeds of consecutive steps.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from zorba.log.errors import LogError
from zorba.log.frame import BodyReader, varint
from zorba.optim import step_seed
from zorba_kernels.noise import ROUNDING_DOMAIN

MAX_TERMS = 1 << 20
"""Terms that one entry may have."""

_SEED = struct.Struct("<Q")
_REMEMBERED = 8192  # seeds of past steps; terms of older steps are written in full


@dataclass(frozen=True)
class Run:
    """Samples ``first`` to ``first + samples - 1`` of each of some seeds.

    Attributes:
        seed: the only seed, where it belongs to no step of the run; else None.
        back: how many steps ago the first seed's step was; the next ones are of the steps after it.
        first: the first sample.
        samples: how many of each seed.
        seeds: how many seeds.
    """

    seed: int | None
    back: int
    first: int
    samples: int
    seeds: int = 1

    def continued_by(self, other: Run) -> bool:
        """Whether the single seed of ``other`` belongs behind those of this run."""
        return (
            self.seed is None
            and other.seed is None
            and other.back == self.back - self.seeds
            and (self.first, self.samples) == (other.first, other.samples)
        )


class StepSeeds:
    """Seeds of the steps of a run, and steps of those seeds.

    Args:
        run_seed: uint64 that the run started from; None where seeds follow no such rule.
    """

    def __init__(self, run_seed: int | None) -> None:
        self.run_seed = run_seed
        self._seeds: dict[int, int] = {}
        self._steps: dict[int, int] = {}
        self._upto = 0  # seeds of all recent steps below this one were looked up

    def of(self, step: int) -> int:
        """Returns the seed of a step."""
        if self.run_seed is None:
            raise LogError("the entry refers to seeds of steps, but the log has no run seed")
        # A step's seed is a hash: momentum asks for the same ones again and again.
        seed = self._seeds.get(step)
        if seed is None:
            seed = step_seed(self.run_seed, step)
            self._seeds[step] = seed
            self._steps[seed] = step
            if len(self._seeds) > _REMEMBERED:
                oldest = next(iter(self._seeds))
                self._steps.pop(self._seeds.pop(oldest), None)
        return seed

    def finder(self, step: int) -> Callable[[int], int | None]:
        """Returns a function that finds the step, up to this one, that a seed is of."""
        if self.run_seed is None:
            return lambda seed: None
        # Every step, also those that were skipped or that no entry of this process asked for: the
        # bytes of an entry must not depend on where a run was interrupted.
        for past in range(max(self._upto, step - _REMEMBERED // 2), step + 1):
            self.of(past)
        self._upto = max(self._upto, step + 1)

        def find(seed: int) -> int | None:
            at = self._steps.get(seed)
            return at if at is not None and at <= step else None

        return find


def encode_pattern(
    seeds: Sequence[int], samples: Sequence[int], step: int, step_of: Callable[[int], int | None]
) -> bytes:
    """Returns the bytes of an entry's pattern.

    Args:
        seeds: uint64 of each term.
        samples: of each term.
        step: number of the entry.
        step_of: returns the step up to this one that a seed is of, or None.
    """
    if len(seeds) > MAX_TERMS:
        raise LogError(f"an entry of {len(seeds)} terms; at most {MAX_TERMS} are allowed")
    runs: list[Run] = []
    for run in _single_seeds(seeds, samples, step, step_of):
        if runs and runs[-1].continued_by(run):
            runs[-1] = replace(runs[-1], seeds=runs[-1].seeds + 1)
        else:
            runs.append(run)
    return varint(len(runs)) + b"".join(map(_encode_run, runs))


def _single_seeds(
    seeds: Sequence[int], samples: Sequence[int], step: int, step_of: Callable[[int], int | None]
) -> list[Run]:
    runs: list[Run] = []
    before: int | None = None
    for seed, sample in zip(seeds, samples, strict=True):
        last = runs[-1] if runs else None
        # Samples of one seed in order are one run, however many there are.
        if last is not None and seed == before and sample == last.first + last.samples:
            runs[-1] = Run(last.seed, last.back, last.first, last.samples + 1)
        else:
            at = step_of(seed)
            runs.append(Run(seed if at is None else None, step - (at or 0), sample, 1))
        before = seed
    return runs


def _encode_run(run: Run) -> bytes:
    # 0 announces a seed in full; otherwise how far back, from 1.
    start = varint(run.back + 1) if run.seed is None else b"\0" + _SEED.pack(run.seed)
    return start + varint(run.first) + varint(run.samples) + varint(run.seeds)


def decode_pattern(reader: BodyReader) -> tuple[Run, ...]:
    """Takes a pattern off a body; raises LogError if it makes no sense."""
    count = reader.varint("number of runs")
    runs: list[Run] = []
    terms = 0
    for _ in range(min(count, MAX_TERMS + 1)):  # each takes bytes, so this ends with them
        start = reader.varint("seed of a run")
        seed = reader.unpack(_SEED, "seed of a run")[0] if start == 0 else None
        first = reader.varint("first sample")
        samples = reader.varint("number of samples")
        run = Run(seed, max(start - 1, 0), first, samples, reader.varint("number of seeds"))
        one = run.seeds == 1 or (run.seeds > 1 and seed is None)
        if first + samples > ROUNDING_DOMAIN or samples < 1 or not one:
            raise LogError(f"a run of {samples} samples from {first} makes no sense")
        # Counted before anything is allocated: a few bytes may say 2**60 terms.
        terms += run.samples * run.seeds
        if terms > MAX_TERMS:
            raise LogError(f"an entry of {terms} terms; at most {MAX_TERMS} are allowed")
        runs.append(run)
    return tuple(runs)


def count_terms(runs: Sequence[Run]) -> int:
    """Returns how many terms a pattern has."""
    return sum(run.samples * run.seeds for run in runs)


def resolve(
    runs: Sequence[Run], step: int, seed_of: Callable[[int], int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns seeds and samples of a pattern's terms.

    Args:
        runs: the pattern.
        step: number of the entry.
        seed_of: returns the seed of a step.
    """
    seeds: list[int] = []
    samples: list[int] = []
    # In the order in which the run added them: float32 sums depend on it.
    for run in runs:
        begin = step - run.back
        if run.seed is None and not 0 <= begin <= step + 1 - run.seeds:
            raise LogError(f"step {step} has terms of steps {begin} to {begin + run.seeds - 1}")
        for at in range(run.seeds):
            seed = seed_of(begin + at) if run.seed is None else run.seed
            seeds += [seed] * run.samples
            samples += range(run.first, run.first + run.samples)
    return tuple(seeds), tuple(samples)
