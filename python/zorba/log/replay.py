"""Replay: rebuilds fine-tuned weights from their base and a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import zorba_kernels as zk
from zorba.blocks import find_blocks
from zorba.identity import layout_of, model_fingerprint
from zorba.log.entry import LogEntry
from zorba.log.errors import LogError, WrongBaseError
from zorba.log.header import LogHeader, Parameter, dtype_name, parameters_of
from zorba.log.reader import Log
from zorba.tables import DeviceTables, TableLike, each_table, fingerprint
from zorba_kernels.noise import Distribution, Rounding, canonical_name
from zorba_kernels.table import DTYPE_CODES

ROUNDS_A_PASS = 64
"""Entries that one pass applies: enough that reading and writing the weights costs nothing beside
the arithmetic, few enough that progress is seen."""
COEFS_A_PASS = 1 << 20
"""Coefficients of a pass (groups times terms), where a single entry does not have more."""

Progress = Callable[[int, int], None]
"""Gets the number of entries that were replayed, and how many there are."""


@dataclass(frozen=True)
class ReplayReport:
    """Result of a replay.

    Attributes:
        steps: entries that changed weights.
        passes: over the weights.
        seconds: of the passes.
        fingerprint: of the active parameters now.
        verified: number of the last entry after which the weights were compared with the run's, and
            were the same; None where the log tells no fingerprint, or none was asked for.
    """

    steps: int
    passes: int
    seconds: float
    fingerprint: int
    verified: int | None


def apply_entries(
    tables: TableLike,
    entries: Sequence[LogEntry],
    distribution: Distribution,
    rounding: Rounding,
) -> None:
    """Applies log entries in one pass over each table, in place.

    Weights are rounded after each entry: R entries in one call leave the bits of R calls.

    Args:
        tables: the active parameters; modified. Groups are the rows of the entries' coefficients.
        entries: in order; empty ones change nothing.
        distribution: of the noise.
        rounding: of 16-bit weights.
    """
    changing = [entry for entry in entries if not entry.empty]
    if not changing:
        return
    # One program for all entries: the kernel reads and writes each weight once, and rounds after
    # each entry in registers, so the bits are those of one call an entry.
    zeros = torch.zeros(changing[0].terms.coefs.shape[0])
    program = zk.Program(
        [seed for entry in changing for seed in entry.terms.seeds],
        torch.cat([entry.terms.coefs for entry in changing], dim=1),
        distribution,
        rounding,
        [entry.rounding_seed for entry in changing],
        samples=[sample for entry in changing for sample in entry.terms.samples],
        rounds=[len(entry.terms.seeds) for entry in changing],
        decay=torch.stack([zeros if e.decay is None else e.decay for e in changing], dim=1),
    )
    for table in each_table(tables):
        table.run(program)


def replay(
    target: nn.Module | TableLike,
    log: Log,
    *,
    verify: bool = True,
    progress: Progress | None = None,
) -> ReplayReport:
    """Turns a log's base into the fine-tuned model, in place, bit for bit.

    Args:
        target: the base, a model or the tables of its active parameters; its weights are modified.
        log: of a fine-tune or of a federation.
        verify: whether to compare fingerprints. The base is checked in any case.
        progress: called after each pass.

    Raises:
        WrongBaseError: the target is not the model that the log starts from; nothing was modified.
        LogError: the weights are not those of the run. They are modified.
        Any exception that interrupts a pass (Ctrl-C): the weights then are somewhere on their way.
    """
    # Before a weight is touched: replaying twice, or on another model, must leave it as it is.
    tables = check_base(target, log)
    header = log.header
    # A finished run tells the fingerprint at its end; a federation tells, in most entries, that of
    # the weights before the entry. The last one that is known is compared.
    known = _last_known(log) if verify else None
    if known is not None and known < log.first:  # a run without a step
        _compare(tables, log, known)
    done = passes = 0
    seconds = 0.0
    for last, chunk in _chunks(log.entries(), header.num_groups, known):
        started = time.perf_counter()
        apply_entries(tables, chunk, header.distribution, header.rounding)
        seconds += time.perf_counter() - started
        passes += bool(chunk)
        done += len(chunk)
        if last == known:
            _compare(tables, log, last)
        if chunk and progress is not None:
            progress(done, log.num_steps)
    return ReplayReport(done, passes, seconds, fingerprint(tables), known)


def _last_known(log: Log) -> int | None:
    if log.fingerprint is not None:
        return log.last
    unknown = (None, log.header.identity.start)  # the base itself was compared already
    numbers = range(log.last, log.first - 1, -1)
    return next((n for n in numbers if log.fingerprint_after(n) not in unknown), None)


def _compare(tables: TableLike, log: Log, number: int) -> None:
    found = fingerprint(tables)
    expected = log.fingerprint if number == log.last else None
    if expected is None:
        expected = log.fingerprint_after(number)
    if found != expected:
        raise LogError(
            f"after entry {number} the fingerprint is {found:#018x}, that of the run was "
            f"{expected:#018x}: something else than the recorded entries changed weights in the "
            'run (placement "inplace" restores to rounding)'
        )


def _chunks(
    entries: Iterator[LogEntry], groups: int, stop: int | None
) -> Iterator[tuple[int, list[LogEntry]]]:
    """Splits the entries that change weights into passes, each with the number it leads up to.

    A pass ends with entry ``stop``, whether that one changes weights or not.
    """
    chunk: list[LogEntry] = []
    coefs, last = 0, -1
    for entry in entries:
        # Bounded in coefficients too: with many groups and momentum, 64 entries may be a gigabyte.
        more = 0 if entry.empty else groups * len(entry.terms.seeds)
        if chunk and (len(chunk) == ROUNDS_A_PASS or coefs + more > COEFS_A_PASS):
            yield last, chunk
            chunk, coefs = [], 0
        last = entry.number
        if not entry.empty:
            chunk.append(entry)
            coefs += more
        if last == stop:
            yield last, chunk
            chunk, coefs = [], 0
    if chunk:
        yield last, chunk


# --- Is this the model that the log starts from? --------------------------------------------------


def check_base(target: nn.Module | TableLike, log: Log) -> TableLike:
    """Returns tables of the active parameters, or raises WrongBaseError; modifies nothing.

    Args:
        target: see ``replay``.
        log: whose base it must be.
    """
    header = log.header
    if isinstance(target, nn.Module):
        tables: TableLike = _tables_of(target, header)
    else:
        tables = target
        groups = {table.num_groups for table in each_table(tables)}
        wrong = None
        if groups != {header.num_groups}:
            wrong = f"{sorted(groups)} groups, expected {header.num_groups}"
        elif header.parameters:
            wrong = header.parameter_difference(parameters_of(tables))
        if not wrong and layout_of(tables) != header.identity.layout:
            wrong = "names, shapes, dtypes or groups of the parameters differ"
        if wrong:
            raise WrongBaseError(f"not the log's base: {wrong}")
    # From cheap to dear: names and shapes cost nothing, a fingerprint reads every weight.
    found, start = fingerprint(tables), header.identity.start
    if found == start:
        if isinstance(target, nn.Module) and header.identity.origin is not None:
            _check_whole(target, header.identity.origin)
        return tables
    # The likeliest mistake gets a sentence of its own.
    if found == log.fingerprint:
        raise WrongBaseError(
            f"the log is applied already: fingerprint {found:#018x} is that of its end"
        )
    raise WrongBaseError(
        f"not the log's base: the fingerprint of its active parameters is {found:#018x}, expected "
        f"{start:#018x}; names, shapes and dtypes agree, values do not"
    )


def _tables_of(model: nn.Module, header: LogHeader) -> DeviceTables:
    named = {canonical_name(name): p for name, p in model.named_parameters()}
    if not header.parameters:
        return _tables_by_layout(model, named, header)
    active = {p.name: named[p.name] for p in header.parameters if p.name in named}
    found = [Parameter(name, tuple(t.shape), dtype_name(t.dtype), 0) for name, t in active.items()]
    wrong = header.parameter_difference(found, groups=False)
    if wrong:
        raise WrongBaseError(f"{type(model).__name__} is not the log's base: {wrong}")
    return DeviceTables(active, {p.name: p.group for p in header.parameters}, header.num_groups)


def _tables_by_layout(
    model: nn.Module, named: dict[str, nn.Parameter], header: LogHeader
) -> DeviceTables:
    """Finds the blocks that a federation trained, whose server knows only their number and layout.

    The hash of the layout (names, shapes, dtypes, blocks) proves a guess right.
    """
    # All blocks, or the last ones, as a fine-tune mostly trains; the first ones for completeness.
    blocks, count = find_blocks(model), header.num_groups
    for chosen in (blocks[-count:], blocks[:count]):
        groups = {name: b for b, block in enumerate(chosen) for name in block.parameters}
        tables = DeviceTables({name: named[name] for name in groups}, groups, count)
        if layout_of(tables) == header.identity.layout:
            return tables
    raise WrongBaseError(
        f"{type(model).__name__} is not the log's base: neither its last nor its first {count} "
        f"blocks of {len(blocks)} have the names, shapes and dtypes that the log was made for; "
        "give the tables of the active parameters instead"
    )


def _check_whole(model: nn.Module, origin: int) -> None:
    found = model_fingerprint((n, p) for n, p in model.named_parameters() if p.dtype in DTYPE_CODES)
    if found != origin:
        raise WrongBaseError(
            "not the log's base: its active parameters agree, its frozen ones do not (the "
            f"fingerprint of all is {found:#018x}, expected {origin:#018x})"
        )
