"""Records: what a step did to the weights, in as few bytes as it takes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zorba.log.errors import TrajectoryError
from zorba.log.frame import BodyReader
from zorba.log.pattern import Run, count_terms, decode_pattern, encode_pattern, resolve
from zorba.optim.terms import NoiseTerms, step_seed

MAX_COEFS = 1 << 26
"""Coefficients that one step may have: groups times terms."""

STEP, SKIP, FOOTER = 1, 2, 3
"""Kinds of records, bits 0 and 1 of a body's first byte."""
_KIND = 3
_PATTERN = 4  # a pattern follows; else it is that of the step record before
_ROUNDING = 8  # a rounding seed follows; else it is the step's own seed
_DECAY = 16  # decays follow
_SHARED = 32  # one row of coefficients and of decays is for all groups
_STEP_FLAGS = STEP | _PATTERN | _ROUNDING | _DECAY | _SHARED

_SEED = struct.Struct("<Q")
_REMEMBERED = 8192  # seeds of past steps: more terms of older steps are told in full


@dataclass(frozen=True)
class Step:
    """What a step did: ``w <- round(w - decay * w + terms)``.

    Attributes:
        step: its number in the run.
        terms: what it added.
        rounding_seed: uint64.
        decay: float32 [groups], or None.
    """

    step: int
    terms: NoiseTerms
    rounding_seed: int
    decay: Tensor | None


@dataclass(frozen=True)
class Skip:
    """A step that left the weights alone."""

    step: int


@dataclass(frozen=True)
class Footer:
    """The end: fingerprint of the active parameters after the last step."""

    fingerprint: int


class Seeds:
    """Seeds of the steps of a run, and steps of those seeds."""

    def __init__(self, run_seed: int) -> None:
        self._run_seed = run_seed
        self._seeds: dict[int, int] = {}
        self._steps: dict[int, int] = {}

    def of(self, step: int) -> int:
        """Returns the seed of a step."""
        seed = self._seeds.get(step)
        if seed is None:
            seed = step_seed(self._run_seed, step)
            self._seeds[step] = seed
            self._steps[seed] = step
            if len(self._seeds) > _REMEMBERED:
                oldest = next(iter(self._seeds))
                self._steps.pop(self._seeds.pop(oldest), None)
        return seed

    def finder(self, step: int) -> Callable[[int], int | None]:
        """Returns what finds the step, up to this one, that a seed is of."""
        if step - 1 not in self._seeds:  # at the start of a file, or after a skipped step
            for past in range(max(0, step - _REMEMBERED // 2), step):
                self.of(past)
        self.of(step)

        def find(seed: int) -> int | None:
            at = self._steps.get(seed)
            return at if at is not None and at <= step else None

        return find


class Encoder:
    """Makes the bodies of a trajectory's records, in order.

    Args:
        run_seed: uint64.
        groups: rows of coefficients.
        pattern: bytes of the last step's pattern, where a file is continued.
    """

    def __init__(self, run_seed: int, groups: int, pattern: bytes = b"") -> None:
        self._seeds = Seeds(run_seed)
        self._groups = groups
        self._pattern = pattern

    def step(self, step: Step) -> tuple[bytes, bytes]:
        """Returns the body of a step, and its pattern, to be given to ``wrote``."""
        terms = step.terms
        find = self._seeds.finder(step.step)
        coefs = terms.coefs.detach().to("cpu", torch.float32).numpy().astype("<f4")
        if coefs.shape[0] != self._groups:
            raise TrajectoryError(
                f"coefs of {coefs.shape[0]} groups in a trajectory of {self._groups}"
            )
        if coefs.size > MAX_COEFS:
            raise TrajectoryError(f"a step of {coefs.size} coefficients; at most {MAX_COEFS}")
        decay = _decay(step.decay, self._groups)
        if not np.isfinite(coefs).all() or (decay is not None and not np.isfinite(decay).all()):
            raise TrajectoryError(f"coefficients and decays of step {step.step} must be finite")
        pattern = encode_pattern(terms.seeds, terms.samples, step.step, find)
        shared = _same_rows(coefs) and (decay is None or _same_rows(decay))
        kind = STEP
        parts = []
        if pattern != self._pattern:
            kind |= _PATTERN
            parts.append(pattern)
        if step.rounding_seed != self._seeds.of(step.step):
            kind |= _ROUNDING
            parts.append(_SEED.pack(step.rounding_seed))
        if shared:
            kind |= _SHARED
            coefs, decay = coefs[:1], decay if decay is None else decay[:1]
        if decay is not None:
            kind |= _DECAY
            parts.append(decay.tobytes())
        return bytes([kind]) + b"".join(parts) + coefs.tobytes(), pattern

    def wrote(self, pattern: bytes) -> None:
        """Notes that the step of this pattern is in the file."""
        self._pattern = pattern


def _decay(decay: Tensor | None, groups: int) -> npt.NDArray[np.float32] | None:
    if decay is None or not bool((decay != 0).any()):
        return None
    column = decay.detach().to("cpu", torch.float32).reshape(-1)
    if len(column) not in (1, groups):
        raise TrajectoryError(f"decays of {len(column)} groups in a trajectory of {groups}")
    return column.expand(groups).numpy().astype("<f4")


def _same_rows(matrix: npt.NDArray[np.float32]) -> bool:
    words = matrix.view("<u4")  # bits: 0 and -0 differ
    return len(matrix) > 1 and bool((words == words[:1]).all())


class Decoder:
    """Reads the bodies of a trajectory's records, in order.

    Attributes:
        next_step: number of the step that the next record is of.
        pattern: bytes of the last step's pattern.
    """

    def __init__(self, run_seed: int, groups: int, first_step: int) -> None:
        self._seeds = Seeds(run_seed)
        self._groups = groups
        self.next_step = first_step
        self.pattern = b""
        self._runs: tuple[Run, ...] | None = None

    def record(self, body: memoryview) -> Step | Skip | Footer:
        """Returns what a body tells; raises TrajectoryError if it makes no sense."""
        reader = BodyReader(body)
        flags = reader.raw(1, "a record")[0]
        kind = flags & _KIND
        if kind == STEP and not flags & ~_STEP_FLAGS:
            record: Step | Skip | Footer = self._step(reader, flags)
        elif flags == SKIP:
            record = Skip(self.next_step)
        elif flags == FOOTER:
            record = Footer(reader.unpack(_SEED, "fingerprint")[0])
        else:
            raise TrajectoryError(f"a record of the unknown kind {flags}")
        reader.end()
        self.next_step += kind != FOOTER
        return record

    def _step(self, reader: BodyReader, flags: int) -> Step:
        step = self.next_step
        if flags & _PATTERN:
            view = reader.peek()
            self._runs = decode_pattern(reader)
            self.pattern = bytes(view[: len(view) - reader.left])
        if self._runs is None:
            raise TrajectoryError(f"step {step} has no pattern")
        count = count_terms(self._runs)
        if count * self._groups > MAX_COEFS:
            raise TrajectoryError(f"a step of {count * self._groups} coefficients")
        rounding_seed = self._seeds.of(step)
        if flags & _ROUNDING:
            (rounding_seed,) = reader.unpack(_SEED, "rounding seed")
        rows = 1 if flags & _SHARED else self._groups
        decay = reader.array("<f4", rows, "decays") if flags & _DECAY else None
        coefs = reader.array("<f4", rows * count, "coefficients").reshape(rows, count)
        if not np.isfinite(coefs).all() or (decay is not None and not np.isfinite(decay).all()):
            raise TrajectoryError(f"coefficients and decays of step {step} are not all finite")
        seeds, samples = resolve(self._runs, step, self._seeds.of)
        return Step(
            step,
            NoiseTerms(seeds, samples, torch.from_numpy(coefs).expand(self._groups, count)),
            rounding_seed,
            None if decay is None else torch.from_numpy(decay).expand(self._groups),
        )


def skip_body() -> bytes:
    """Returns the body of a step that was skipped."""
    return bytes([SKIP])


def footer_body(fingerprint: int) -> bytes:
    """Returns the body of the last record."""
    return bytes([FOOTER]) + _SEED.pack(fingerprint)
