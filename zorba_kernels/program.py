"""Program: the linear combination of noises that one pass adds, checked, and packed for kernels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from zorba_kernels import dispatch
from zorba_kernels.noise import (
    DISTRIBUTION_CODES,
    DISTRIBUTIONS,
    ROUNDING_DOMAIN,
    ROUNDINGS,
    Distribution,
    Rounding,
    as_int64,
)

T = TypeVar("T")
Words = int | Sequence[int] | Tensor
"""Integers of terms or rounds: uint64 values, or their bits in an int64 tensor."""
Reals = float | Sequence[float] | Sequence[Sequence[float]] | Tensor


class Program:
    """Rounds of seeded noise terms: ``w <- round(w - decay * w + sum_k coefs[group, k] * z_k)``.

    ``z_k`` is ``z(seeds[k], stream, samples[k], .)``; the sum is in float32, in the order of k.
    Perturbing, restoring and updating of zeroth-order methods are programs (MeZO, arXiv 2305.17333,
    algorithm 1). ``ParamTable.run`` applies one, to any number of tables. A term whose coefficient
    is 0 is skipped; a group whose decay and coefficients of a round are 0 keeps its bits.

    Args:
        seeds: uint64 of each term, [terms]; in an int64 tensor their bits. Under ``torch.compile``
            seeds that change from call to call belong in a tensor: its symbolic integers end at
            2**63, which half of all seeds exceed.
        coefs: finite float32; [terms] for all groups alike, or [groups, terms].
        distribution: "gaussian" (standard normal), "rademacher" (+1 or -1), or "rank1" (an outer
            product of the signs of a parameter's rows and columns).
        rounding: of 16-bit weights: "nearest" (ties to even), or "stochastic", which is unbiased
            and made from ``rounding_seed``, so that replicas round alike. float32 weights always
            round to nearest.
        rounding_seed: uint64, one a round; the first seed of each round by default.
        samples: which perturbation of its seed each term is, below 2**31, [terms]; 0 by default.
        rounds: terms in each round; one round of all terms by default. Weights are rounded after
            each round: R rounds in one program give the bits of R programs.
        decay: share of each weight that is taken off in the same rounding (learning rate times
            weight decay); a number, [groups] or [groups, rounds].
        backend: name of the backend that runs it, or None for the best that can serve. It is
            chosen at the first run on a device, and kept.

    Attributes:
        seeds: uint64 of each term, [terms].
        samples: uint32 below 2**31 of each term, [terms].
        round_ends: index one past each round's last term, [rounds].
        rounding_seeds: uint64 of each round, [rounds].
        distribution: of every term.
        rounding: of every round.

    Raises:
        TypeError, ValueError: bad arguments.
    """

    def __init__(
        self,
        seeds: Words,
        coefs: Reals,
        distribution: str = "gaussian",
        rounding: str = "nearest",
        rounding_seed: Words | None = None,
        *,
        samples: Words | None = None,
        rounds: Words | None = None,
        decay: Reals | None = None,
        backend: str | None = None,
    ) -> None:
        # Everything that can be refused is refused here, before a weight is touched.
        check_choice("distribution", distribution, DISTRIBUTIONS)
        check_choice("rounding", rounding, ROUNDINGS)
        self.distribution = cast(Distribution, distribution)
        self.rounding = cast(Rounding, rounding)
        self.seeds = _uint64s(seeds, "seed")
        terms = len(self.seeds)
        zeros = (0,) * terms
        self.samples = zeros if samples is None else tuple(map(check_sample, _listed(samples)))
        if len(self.samples) != terms:
            raise ValueError(f"{terms} seeds but {len(self.samples)} samples")
        given = [terms] if rounds is None else _listed(rounds)
        lengths = [integer(n, "terms of a round") for n in given]
        if any(n < 0 for n in lengths) or sum(lengths) != terms:
            raise ValueError(f"rounds {lengths} must be terms a round and add up to {terms} seeds")
        self.round_ends = ends = tuple(itertools.accumulate(lengths))
        if rounding_seed is None:
            # The first seed of each round: nothing else uses its rounding domain.
            parts = zip((0, *ends), ends, strict=False)
            self.rounding_seeds = tuple(self.seeds[a] if a < b else 0 for a, b in parts)
        else:
            self.rounding_seeds = _uint64s(rounding_seed, "rounding_seed")
        if len(self.rounding_seeds) != len(lengths):
            raise ValueError(f"{len(lengths)} rounds but {len(self.rounding_seeds)} rounding seeds")
        # Kept as given: expanded to the groups of a table when it is run on one.
        self._coefs = _finite(coefs, "coefs")
        self._decays = _NO_DECAY if decay is None else _finite(decay, "decay")
        # How many groups there are is only known with a table; what does not depend on it is
        # refused here.
        self._coefs_shape(self._coefs.shape[0] if self._coefs.ndim == 2 else 1)
        self._backend = backend
        self._kept: dict[Hashable, Any] = {}

    def _coefs_shape(self, groups: int) -> tuple[int, int]:
        terms = len(self.seeds)
        shape = tuple(self._coefs.shape)
        # A bare number is one term's coefficient.
        if shape not in ((terms,), (groups, terms)) and not (shape == () and terms == 1):
            raise ValueError(
                f"coefs has shape {shape}; expected [{terms}] (one a seed) or [{groups}, {terms}] "
                "(one a group and seed)"
            )
        return groups, terms

    def coefs(self, groups: int) -> Tensor:
        """Returns float32 [groups, terms], or raises ValueError if made for other groups."""
        return self._coefs.expand(self._coefs_shape(groups))

    def decays(self, groups: int) -> Tensor:
        """Returns float32 [groups, rounds], or raises ValueError if made for other groups."""
        rounds = len(self.round_ends)
        # One dimension means one a group, as coefficients are one a term: torch would take rounds.
        column = self._decays.unsqueeze(1) if self._decays.ndim == 1 else self._decays
        try:
            return column.expand(groups, rounds)
        except RuntimeError:
            raise ValueError(
                f"decay has shape {tuple(self._decays.shape)}; expected a number, [{groups}] (one "
                f"a group) or [{groups}, {rounds}] (one a group and round)"
            ) from None

    def backend(self, device: torch.device) -> dispatch.Backend:
        """Returns the backend that runs the program on a device; see ``dispatch.choose``."""
        return self.once(device, lambda: dispatch.choose(self._backend, device))

    def packed(self, groups: int) -> PackedProgram:
        """Returns the program as compiled code reads it, in host memory."""
        return self.once(groups, lambda: PackedProgram(self, groups, torch.device("cpu")))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Returns the result of ``make``, called for the first time only; backends keep theirs."""
        # Not weak: what is kept is as good as the program for as long as it lives.
        if key not in self._kept:
            self._kept[key] = make()
        return cast(T, self._kept[key])


class PackedProgram:
    """A program in the memory of a device, for tables of a number of groups.

    ``address`` is that of ``struct Program`` (csrc/packed.h), which is in host memory: addresses of
    the arrays, then the numbers.
    """

    ARRAYS = ("seeds", "samples", "round_ends", "rounding_seeds", "coefs", "decays")
    NUMBERS = ("terms", "rounds", "groups", "distribution", "stochastic")

    def __init__(self, program: Program, groups: int, device: torch.device) -> None:
        """Copies the program to the device, in one transfer that the host does not wait for."""
        self.terms, self.rounds, self.groups = len(program.seeds), len(program.round_ends), groups
        self.distribution = DISTRIBUTION_CODES[program.distribution]
        self.stochastic = program.rounding == "stochastic"
        # The order of ARRAYS, and of the struct.
        words = (program.seeds, program.samples, program.round_ends, program.rounding_seeds)
        counts = (self.terms, self.rounds)
        self._sizes = [8 * len(values) for values in words] + [4 * groups * n for n in counts]
        integers = torch.tensor([as_int64(v) for values in words for v in values]).long()
        reals = (program.coefs(groups).reshape(-1), program.decays(groups).reshape(-1))
        # Words first: every array is then aligned to its type.
        parts = (integers.view(torch.uint8), torch.cat(reals).view(torch.uint8))
        memory = torch.cat(parts)
        if device.type == "cuda":
            # Pinned, so that the copy is ordered on the stream and the host goes on at once.
            memory = memory.pin_memory().to(device, non_blocking=True)
        self._memory = memory
        # Addresses by arithmetic: views of the memory cost more than all the rest of packing.
        starts = itertools.accumulate(self._sizes[:-1], initial=memory.data_ptr())
        numbers = (int(getattr(self, name)) for name in self.NUMBERS)
        self._struct = torch.tensor([*starts, *numbers], dtype=torch.int64)
        self.address = self._struct.data_ptr()

    @functools.cached_property
    def arrays(self) -> dict[str, Tensor]:
        """The arrays by name, in the order of ``struct Program``: views of the device's memory.

        ``seeds`` and ``rounding_seeds`` (bits of the uint64), ``samples`` and ``round_ends`` are
        int64; ``coefs`` [groups, terms] and ``decays`` [groups, rounds] are float32.
        """
        *words, coefs, decays = torch.split(self._memory, self._sizes)
        reals = [part.view(torch.float32).view(self.groups, -1) for part in (coefs, decays)]
        integers = [part.view(torch.int64) for part in words]
        return dict(zip(self.ARRAYS, [*integers, *reals], strict=True))


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
    # __index__ takes integers of Python, numpy and torch, and no float that happens to be whole.
    try:
        return value.__index__()
    except AttributeError:
        raise TypeError(f"{what} must be an integer, got {value!r}") from None


def _listed(value: Words) -> list[int]:
    # One transfer for all values: element by element would wait for the device each time.
    if isinstance(value, Tensor):
        return list(value.reshape(-1).tolist())
    return list(value) if isinstance(value, Iterable) else [value]


def _uint64s(value: Words, what: str) -> tuple[int, ...]:
    """uint64 values; a tensor holds their bits, as torch has no arithmetic on uint64."""
    if isinstance(value, Tensor) and value.dtype == torch.int64:
        return tuple(v % (1 << 64) for v in _listed(value))
    return tuple(check_uint64(v, what) for v in _listed(value))


def _finite(values: Reals, what: str) -> Tensor:
    # Through float64, so that a number beyond float32 is seen as given, not as an infinity.
    wide = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    narrow = wide.to(torch.float32).contiguous()
    size = narrow.abs()
    if not bool((size < torch.inf).all()):
        bad = wide[~torch.isfinite(narrow)][0].item()
        raise ValueError(f"{what} must be finite float32 numbers, got {bad}")
    # A subnormal counts as zero: whether a term is skipped must not depend on the flush mode.
    return torch.where(size < torch.finfo(torch.float32).tiny, 0.0, narrow)


_NO_DECAY = torch.zeros(())
