"""Replay: rebuilds fine-tuned weights from their base and a trajectory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import zorba_kernels as zk
from zorba.identity import model_fingerprint
from zorba.log.errors import TrajectoryError, WrongBaseError
from zorba.log.file import Trajectory
from zorba.log.header import (
    Parameter,
    Tables,
    TrajectoryHeader,
    as_tables,
    fingerprint_of,
    parameters_of,
)
from zorba.log.record import Step
from zorba_kernels.noise import canonical_name
from zorba_kernels.table import DTYPE_CODES

ROUNDS_A_PASS = 64
"""Steps that one pass over the weights makes: enough that reading and writing them costs nothing
beside the arithmetic, few enough that progress is seen."""
COEFS_A_PASS = 1 << 20
"""Coefficients of a pass (groups times terms), where a single step does not have more."""

Progress = Callable[[int, int], None]
"""Is told how many steps were replayed, and how many there are."""


@dataclass(frozen=True)
class ReplayReport:
    """What a replay did.

    Attributes:
        steps: that changed weights.
        passes: over the weights.
        seconds: of the passes.
        fingerprint: of the active parameters now.
        verified: whether it was compared with the trajectory's, and was the same; a trajectory
            without an end cannot be verified.
    """

    steps: int
    passes: int
    seconds: float
    fingerprint: int
    verified: bool


def replay(
    target: nn.Module | Tables,
    trajectory: Trajectory,
    *,
    verify: bool = True,
    progress: Progress | None = None,
) -> ReplayReport:
    """Turns a trajectory's base into the fine-tuned model, in place, bit for bit.

    Args:
        target: the base, a model or the tables of its active parameters; its weights are modified.
        trajectory: what to do to it.
        verify: whether to compare the fingerprint at the end. The base is checked in any case.
        progress: called after each pass.

    Raises:
        WrongBaseError: the target is not what the trajectory starts from; nothing was modified.
        TrajectoryError: the weights at the end are not those of the run. They are modified.
        Whatever interrupts a pass (Ctrl-C): the weights are then somewhere on their way.
    """
    tables = check_base(target, trajectory)
    header = trajectory.header
    done = passes = 0
    seconds = 0.0
    for chunk in _chunks(trajectory.steps(), header.num_groups):
        started = time.perf_counter()
        _add_steps(tables, chunk, header)
        seconds += time.perf_counter() - started
        passes += 1
        done += len(chunk)
        if progress is not None:
            progress(done, trajectory.num_steps)
    fingerprint = fingerprint_of(tables)
    verified = verify and trajectory.fingerprint is not None
    if verified and fingerprint != trajectory.fingerprint:
        raise TrajectoryError(
            f"after {done} steps the fingerprint is {fingerprint:#018x}, that of the run was "
            f"{trajectory.fingerprint:#018x}: something else than the recorded steps changed "
            'weights in the run (placement "inplace" restores to rounding)'
        )
    return ReplayReport(done, passes, seconds, fingerprint, verified)


def check_base(target: nn.Module | Tables, trajectory: Trajectory) -> tuple[zk.ParamTable, ...]:
    """Returns tables of the active parameters, or raises WrongBaseError; modifies nothing.

    Args:
        target: see ``replay``.
        trajectory: whose base it must be.
    """
    header = trajectory.header
    if isinstance(target, nn.Module):
        tables = _tables_of(target, header)
    else:
        tables = as_tables(target)
        wrong = header.parameter_difference(parameters_of(tables))
        if not wrong and tables[0].num_groups != header.num_groups:
            wrong = f"{tables[0].num_groups} groups, expected {header.num_groups}"
        if wrong:
            raise WrongBaseError(f"not the trajectory's base: {wrong}")
    found = fingerprint_of(tables)
    if found == header.base:
        if isinstance(target, nn.Module) and header.whole is not None:
            _check_whole(target, header)
        return tables
    if found == trajectory.fingerprint:
        raise WrongBaseError(
            f"the trajectory is applied already: fingerprint {found:#018x} is that of its end"
        )
    raise WrongBaseError(
        f"not the trajectory's base: the fingerprint of its {len(header.parameters)} active "
        f"parameters is {found:#018x}, expected {header.base:#018x}; names, shapes and dtypes "
        "agree, values do not"
    )


def _tables_of(model: nn.Module, header: TrajectoryHeader) -> tuple[zk.ParamTable, ...]:
    named = {canonical_name(name): p for name, p in model.named_parameters()}
    active = {p.name: named[p.name] for p in header.parameters if p.name in named}
    found = [Parameter(name, tuple(t.shape), t.dtype, 0) for name, t in active.items()]
    wrong = header.parameter_difference(found, groups=False)
    if wrong:
        raise WrongBaseError(f"{type(model).__name__} is not the trajectory's base: {wrong}")
    groups = {p.name: p.group for p in header.parameters}
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in active.items():
        by_device.setdefault(tensor.device, {})[name] = tensor
    return tuple(
        zk.ParamTable(part, {name: groups[name] for name in part}, num_groups=header.num_groups)
        for part in by_device.values()
    )


def _check_whole(model: nn.Module, header: TrajectoryHeader) -> None:
    found = model_fingerprint((n, p) for n, p in model.named_parameters() if p.dtype in DTYPE_CODES)
    if found != header.whole:
        raise WrongBaseError(
            "not the trajectory's base: its active parameters agree, its frozen ones do not (the "
            f"fingerprint of all is {found:#018x}, expected {header.whole:#018x})"
        )


def _chunks(steps: Iterator[Step], groups: int) -> Iterator[list[Step]]:
    chunk: list[Step] = []
    coefs = 0
    for step in steps:
        more = groups * len(step.terms.seeds)
        if chunk and (len(chunk) == ROUNDS_A_PASS or coefs + more > COEFS_A_PASS):
            yield chunk
            chunk, coefs = [], 0
        chunk.append(step)
        coefs += more
    if chunk:
        yield chunk


def _add_steps(
    tables: tuple[zk.ParamTable, ...], steps: list[Step], header: TrajectoryHeader
) -> None:
    """One pass: a round for each step."""
    seeds = [seed for step in steps for seed in step.terms.seeds]
    samples = [sample for step in steps for sample in step.terms.samples]
    coefs = torch.cat([step.terms.coefs for step in steps], dim=1)
    zeros = torch.zeros(header.num_groups)
    decay = torch.stack([zeros if s.decay is None else s.decay for s in steps], dim=1)
    for table in tables:
        zk.add_noise_(
            table,
            seeds,
            coefs,
            header.distribution,
            header.rounding,
            [step.rounding_seed for step in steps],
            samples=samples,
            rounds=[len(step.terms.seeds) for step in steps],
            decay=decay,
        )
