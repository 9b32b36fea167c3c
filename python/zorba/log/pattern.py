"""Patterns: which noises an entry adds, relative to its number.

Nearly every step adds samples 0 to P - 1 of its own seed, or with momentum those of the last few
steps as well; a round of a federation adds the samples of a few seeds that nobody can guess. All
of these are runs: ranges of samples, of one seed or of the seeds of consecutive steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from zorba.log.binary import U64, LogError, Reader, varint
from zorba.optim import step_seed
from zorba_kernels.noise import ROUNDING_DOMAIN

MAX_TERMS = 1 << 20  # of an entry
_WINDOW = 8192  # steps back that a seed is looked for; those of older steps are written in full
# A step's seed is a hash: momentum asks for the same ones again and again.
_step_seed = lru_cache(maxsize=2 * _WINDOW)(step_seed)


class Run(NamedTuple):
    """Samples ``first`` to ``first + samples - 1`` of each of some seeds."""

    seed: int | None  # the only seed, where it belongs to no step; else None
    back: int  # how many steps ago the first seed's step was, the next ones are of those after it
    first: int
    samples: int  # of each seed
    seeds: int = 1


def seed_of(run_seed: int | None, step: int) -> int:
    """Returns the seed of a step of the run."""
    if run_seed is None:
        raise LogError("the entry refers to seeds of steps, but the log has no run seed")
    return _step_seed(run_seed, step)


def encode_pattern(
    seeds: Sequence[int], samples: Sequence[int], step: int, run_seed: int | None
) -> bytes:
    """Returns the bytes of the pattern of an entry with this number."""
    if len(seeds) > MAX_TERMS:
        raise LogError(f"an entry of {len(seeds)} terms; at most {MAX_TERMS} are allowed")
    steps = _steps_of(set(seeds), step, run_seed)
    singles: list[Run] = []
    for k, (seed, sample) in enumerate(zip(seeds, samples, strict=True)):
        # Samples of one seed in order are one run, however many there are.
        if k and (seed, sample) == (seeds[k - 1], samples[k - 1] + 1):
            singles[-1] = singles[-1]._replace(samples=singles[-1].samples + 1)
        elif seed in steps:
            singles.append(Run(None, step - steps[seed], sample, 1))
        else:
            singles.append(Run(seed, 0, sample, 1))
    runs: list[Run] = []
    for run in singles:
        last = runs[-1] if runs else None
        # Equal samples of the seeds of consecutive steps are one run as well.
        if last is not None and run == Run(None, last.back - last.seeds, last.first, last.samples):
            runs[-1] = last._replace(seeds=last.seeds + 1)
        else:
            runs.append(run)
    fields = [varint(len(runs))]
    for run in runs:
        # 0 announces a seed in full; otherwise how far back, from 1.
        start = varint(run.back + 1) if run.seed is None else b"\0" + U64.pack(run.seed)
        fields += [start, varint(run.first), varint(run.samples), varint(run.seeds)]
    return b"".join(fields)


def _steps_of(seeds: set[int], step: int, run_seed: int | None) -> dict[int, int]:
    """Returns the steps, up to this one, of the seeds that are of the run."""
    steps: dict[int, int] = {}
    # All recent steps, also those that were skipped or that this process never saw: the bytes of
    # an entry must not depend on where a run was interrupted.
    for past in range(step, max(step - _WINDOW, -1), -1):
        if run_seed is None or len(steps) == len(seeds):
            break
        seed = seed_of(run_seed, past)
        if seed in seeds:
            steps[seed] = past
    return steps


def decode_pattern(reader: Reader) -> list[Run]:
    """Takes a pattern off a body; raises LogError if it makes no sense."""
    count = reader.varint("number of runs")
    runs: list[Run] = []
    terms = 0
    for _ in range(min(count, MAX_TERMS + 1)):  # each takes bytes, so this ends with them
        start = reader.varint("seed of a run")
        seed = reader.unpack(U64, "seed of a run")[0] if start == 0 else None
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
    return runs


def resolve(
    runs: list[Run], step: int, run_seed: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns seeds and samples of a pattern's terms."""
    seeds: list[int] = []
    samples: list[int] = []
    # In the order in which the run added them: float32 sums depend on it.
    for run in runs:
        begin = step - run.back
        if run.seed is None and not 0 <= begin <= step + 1 - run.seeds:
            raise LogError(f"step {step} has terms of steps {begin} to {begin + run.seeds - 1}")
        for at in range(begin, begin + run.seeds):
            seed = seed_of(run_seed, at) if run.seed is None else run.seed
            seeds += [seed] * run.samples
            samples += range(run.first, run.first + run.samples)
    return tuple(seeds), tuple(samples)
