"""The operations: one primitive, and its companions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zorba_kernels.dispatch import choose
from zorba_kernels.noise import DISTRIBUTIONS, MAX_ELEMENTS, Distribution
from zorba_kernels.program import (
    Program,
    check_choice,
    check_sample,
    check_uint64,
    integer,
    make_program,
)
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
        seeds: uint64 of each term, [terms].
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
    program = make_program(
        seeds,
        coefs,
        table.num_groups,
        distribution,
        rounding,
        rounding_seed,
        samples,
        rounds,
        decay,
    )
    run_program(table, table, program, backend)


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
    program = make_program(
        seeds,
        coefs,
        table.num_groups,
        distribution,
        rounding,
        rounding_seed,
        samples,
        rounds,
        decay,
    )
    table.check_like(out)
    run_program(table, out, program, backend)


def run_program(
    table: ParamTable, out: ParamTable, program: Program, backend: str | None = None
) -> None:
    """Runs a checked program; ``out`` is the table itself or one like it.

    For callers that use one program on many tables: ``add_noise`` without its argument checks.
    """
    table.check()
    if out is not table:
        out.check()
    module = choose(backend, table.device)
    if table.contiguous and out.contiguous:
        module.add_noise(table, out, program)
    else:
        _through_copies(module, table, out, program)


def fingerprint(table: ParamTable, *, backend: str | None = None) -> int:
    """Returns a 64-bit hash of the exact bits of all tensors.

    It depends on the names, dtype-sized bits and positions of the elements, not on the order of
    the tensors, the device or the backend. Two replicas that agree compare 8 bytes. It finds
    accidents; it is no defence against an adversary.
    """
    table.check()
    module = choose(backend, table.device)
    source = table if table.contiguous else _contiguous_copy(table)
    return int(module.fingerprint(source))


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
    check_choice("distribution", distribution, DISTRIBUTIONS)
    size = torch.Size((shape,) if isinstance(shape, int) else tuple(shape))
    offset = integer(offset, "offset")
    if any(n < 0 for n in size):
        raise ValueError(f"shape must not be negative, got {tuple(size)}")
    if offset < 0 or offset + size.numel() > MAX_ELEMENTS:
        raise ValueError(f"elements {offset} to {offset + size.numel()} are outside of [0, 2**35)")
    where = torch.device(device)
    z: Tensor = choose(backend, where).noise(
        size.numel(),
        offset,
        check_uint64(seed, "seed"),
        check_uint64(stream, "stream"),
        check_sample(sample),
        distribution,
        where,
    )
    return z.reshape(size)


def _contiguous_copy(table: ParamTable) -> ParamTable:
    return ParamTable(
        {e.name: e.tensor.contiguous() for e in table.entries},
        groups={e.name: e.group for e in table.entries},
        offsets={e.name: e.offset for e in table.entries},
    )


def _through_copies(module: object, table: ParamTable, out: ParamTable, program: Program) -> None:
    """Works on contiguous copies, one tensor at a time, and copies the results to their places."""
    for source, target in zip(table.entries, out.entries, strict=True):
        piece = ParamTable(
            {source.name: source.tensor.clone(memory_format=torch.contiguous_format)},
            groups={source.name: source.group},
            offsets={source.name: source.offset},
            num_groups=table.num_groups,
        )
        module.add_noise(piece, piece, program)  # type: ignore[attr-defined]
        target.tensor.copy_(piece.entries[0].tensor)
