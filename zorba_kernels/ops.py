"""The operations: one primitive, and its companions.

They run at once (``eager.py``), or become operators of a graph while one is traced (``traced.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zorba_kernels import eager, traced
from zorba_kernels.noise import Distribution
from zorba_kernels.table import ParamTable

Coefs = float | Sequence[float] | Sequence[Sequence[float]] | Tensor


def add_noise_(
    table: ParamTable,
    seeds: int | Sequence[int],
    coefs: Coefs,
    distribution: str = "gaussian",
    rounding: str = "nearest",
    rounding_seed: int | Sequence[int] | None = None,
    *,
    samples: int | Sequence[int] | None = None,
    rounds: Sequence[int] | None = None,
    decay: float | Sequence[float] | Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Adds a linear combination of seeded noises to every tensor of the table, in place.

    ``w <- round(w - decay * w + sum_k coefs[group, k] * z(seeds[k], stream, samples[k], .))``, the
    sum in float32 in the order of k, each weight read once and written once. Perturbing, restoring
    and updating of zeroth-order methods are calls of it (MeZO, arXiv 2305.17333, algorithm 1).
    A term whose coefficient is 0 is skipped; a group whose decay and coefficients of a round are 0
    keeps its bits.

    Args:
        table: the tensors; modified in place.
        seeds: uint64 of each term, [terms]; in an int64 tensor their bits. Under ``torch.compile``
            seeds that change from call to call belong in a tensor: its symbolic integers end at
            2**63, which half of all seeds exceed.
        coefs: finite float32; [terms] for all groups alike, or [groups, terms].
        distribution: "gaussian" (standard normal) or "rademacher" (+1 or -1).
        rounding: of 16-bit weights: "nearest" (ties to even), or "stochastic", which is unbiased
            and made from ``rounding_seed``, so that replicas round alike. float32 weights always
            round to nearest.
        rounding_seed: uint64, one a round; the first seed of each round by default.
        samples: which perturbation of its seed each term is, below 2**31, [terms]; 0 by default.
        rounds: terms in each round; one round of all terms by default. Weights are rounded after
            each round: R rounds in one call give the bits of R calls.
        decay: share of each weight that is taken off in the same rounding (learning rate times
            weight decay); a number, [groups] or [groups, rounds].
        backend: name of a backend, or None for the best that can serve.

    Raises:
        TypeError, ValueError: bad arguments; nothing was changed.
        BackendUnavailableError: the backend asked for cannot serve.
        RuntimeError: a tensor of the table was moved or resized.
    """
    _way().add_noise(
        table,
        table,
        backend,
        seeds=seeds,
        coefs=coefs,
        distribution=distribution,
        rounding=rounding,
        rounding_seed=rounding_seed,
        samples=samples,
        rounds=rounds,
        decay=decay,
    )


def add_noise(
    table: ParamTable,
    out: ParamTable,
    seeds: int | Sequence[int],
    coefs: Coefs,
    distribution: str = "gaussian",
    rounding: str = "nearest",
    rounding_seed: int | Sequence[int] | None = None,
    *,
    samples: int | Sequence[int] | None = None,
    rounds: Sequence[int] | None = None,
    decay: float | Sequence[float] | Tensor | None = None,
    backend: str | None = None,
) -> None:
    """The same as ``add_noise_``, written to the tensors of ``out``; ``table`` is only read.

    Args:
        table: the tensors read.
        out: a table of the same names, shapes, dtypes, groups and offsets; its tensors are
            overwritten.
        seeds: see ``add_noise_``, as all that follow.
        coefs: see ``add_noise_``.
        distribution: see ``add_noise_``.
        rounding: see ``add_noise_``.
        rounding_seed: see ``add_noise_``.
        samples: see ``add_noise_``.
        rounds: see ``add_noise_``.
        decay: see ``add_noise_``.
        backend: see ``add_noise_``.

    Raises:
        ValueError: the tables differ, besides what ``add_noise_`` raises.
    """
    _way().add_noise(
        table,
        out,
        backend,
        seeds=seeds,
        coefs=coefs,
        distribution=distribution,
        rounding=rounding,
        rounding_seed=rounding_seed,
        samples=samples,
        rounds=rounds,
        decay=decay,
    )


def fingerprint(table: ParamTable, *, backend: str | None = None) -> int:
    """Returns a 64-bit hash of the exact bits of all tensors.

    It depends on the names, dtype-sized bits and positions of the elements, not on the order of
    the tensors, the device or the backend. Two replicas that agree compare 8 bytes. It finds
    accidents; it is no defence against an adversary.
    """
    return int(_way().fingerprint(table, backend))


def noise(
    shape: int | Sequence[int],
    *,
    seed: int,
    stream: int,
    sample: int = 0,
    distribution: Distribution = "gaussian",
    device: str | torch.device = "cpu",
    offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Returns the values themselves: ``z(seed, stream, sample, offset + i)``, float32 of ``shape``.

    Args:
        shape: of the result; elements are indexed in row-major order.
        seed: uint64.
        stream: uint64, for a parameter ``zorba_kernels.noise.stream_of(name)``.
        sample: below 2**31.
        distribution: "gaussian" or "rademacher".
        device: where the result lives.
        offset: index of the first element.
        backend: name of a backend, or None for the best that can serve.

    Raises:
        ValueError: an argument out of range.
    """
    way = _way()
    z: Tensor = way.noise(shape, seed, stream, sample, distribution, device, offset, backend)
    return z


def _way() -> Any:
    return traced if torch.compiler.is_compiling() else eager
