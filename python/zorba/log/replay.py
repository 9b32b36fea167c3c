"""Replay: rebuilds fine-tuned weights from their base and a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import zorba_kernels as zk
from zorba.blocks import find_blocks
from zorba.identity import layout_of, model_fingerprint, recordable
from zorba.log.binary import LogError
from zorba.log.entry import LogEntry
from zorba.log.file import Log
from zorba.log.header import LogHeader, parameters_of
from zorba.tables import DeviceTables, TableLike, each_table, fingerprint
from zorba_kernels.noise import Distribution, Rounding, canonical_name

# Entries that one pass applies: enough that reading and writing the weights costs nothing beside
# the arithmetic, few enough that progress is seen.
ROUNDS_A_PASS = 64
COEFS_A_PASS = 1 << 20  # groups times terms, where a single entry does not have more


class WrongBaseError(LogError):
    """A model is not the one that a log starts from."""


@dataclass(frozen=True)
class ReplayReport:
    """Result of a replay."""

    steps: int  # entries that changed weights
    passes: int  # over the weights
    seconds: float  # of the passes
    fingerprint: int  # of the active parameters now
    # The last entry after which the weights were compared with the run's, and were the same; None
    # where the log tells no fingerprint, or none was asked for.
    verified: int | None


def apply_entries(
    tables: TableLike, entries: Sequence[LogEntry], distribution: Distribution, rounding: Rounding
) -> None:
    """Applies log entries to tables in place, in one pass over each, in order.

    Groups of the tables are the rows of the entries' coefficients. Weights are rounded after each
    entry: R entries in one call leave the bits of R calls. Empty entries change nothing.
    """
    changing = [entry for entry in entries if not entry.empty]
    if not changing:
        return
    # One program for all entries: the kernel reads and writes each weight once, and rounds after
    # each entry in registers, so the bits are those of one call an entry.
    decay: torch.Tensor | None = None  # zeros would be checked and packed in every round
    if any(entry.decay is not None for entry in changing):
        zeros = torch.zeros(changing[0].terms.coefs.shape[0])
        decay = torch.stack([zeros if e.decay is None else e.decay for e in changing], dim=1)
    program = zk.Program(
        [seed for entry in changing for seed in entry.terms.seeds],
        torch.cat([entry.terms.coefs for entry in changing], dim=1),
        distribution,
        rounding,
        [entry.rounding_seed for entry in changing],
        samples=[sample for entry in changing for sample in entry.terms.samples],
        rounds=[len(entry.terms.seeds) for entry in changing],
        decay=decay,
    )
    for table in each_table(tables):
        table.run(program)


def replay(
    target: nn.Module | TableLike,
    log: Log,
    *,
    verify: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> ReplayReport:
    """Turns a log's base into the fine-tuned model, in place, bit for bit.

    Args:
        target: the base, a model or the tables of its active parameters; its weights are modified.
        log: of a fine-tune or of a federation.
        verify: whether to compare fingerprints. The base is checked in any case.
        progress: gets, after each pass, how many entries were applied, and how many there are.

    Raises:
        WrongBaseError: the target is not the model that the log starts from; nothing was modified.
        LogError: the weights are not those of the run. They are modified.
        Any exception that interrupts a pass (Ctrl-C): the weights then are somewhere on their way.
    """
    # Before a weight is touched: replaying twice, or on another model, must leave it as it is.
    tables, header = check_base(target, log), log.header
    known = _last_known(log) if verify else None
    # A pass ends where the weights are compared.
    stop = log.last if known is None else known
    ranges = [(log.first, stop)]
    if stop < log.last:
        ranges.append((stop + 1, log.last))
    done = passes = 0
    seconds = 0.0
    for first, last in ranges:
        for entries in _passes(log.entries(first, last), header.num_groups):
            started = time.perf_counter()
            apply_entries(tables, entries, header.distribution, header.rounding)
            seconds += time.perf_counter() - started
            passes += 1
            done += len(entries)
            if progress is not None:
                progress(done, log.num_steps)
        found, expected = fingerprint(tables), log.fingerprint_after(last)
        if last == known and found != expected:
            raise LogError(
                f"after entry {last} the fingerprint is {found:#018x}, that of the run was "
                f"{expected:#018x}: something else than the recorded entries changed weights in "
                'the run (placement "inplace" restores to rounding)'
            )
    return ReplayReport(done, passes, seconds, found, known)


def _last_known(log: Log) -> int | None:
    """Number of the last entry after which the log tells the weights, if it is not the base."""
    # A finished run tells them at its end; a federation, in most entries, before the entry.
    if log.fingerprint is not None:
        return log.last
    unknown, numbers = (None, log.header.identity.start), range(log.last, log.first - 1, -1)
    return next((n for n in numbers if log.fingerprint_after(n) not in unknown), None)


def _passes(entries: Iterable[LogEntry], groups: int) -> Iterator[list[LogEntry]]:
    """Splits the entries that change weights into passes."""
    chunk: list[LogEntry] = []
    coefs = 0
    for entry in entries:
        # Bounded in coefficients too: with many groups and momentum, 64 entries may be a gigabyte.
        more = groups * len(entry.terms.seeds)
        if chunk and (len(chunk) == ROUNDS_A_PASS or coefs + more > COEFS_A_PASS):
            yield chunk
            chunk, coefs = [], 0
        if not entry.empty:
            chunk.append(entry)
            coefs += more
    if chunk:
        yield chunk


def check_base(target: nn.Module | TableLike, log: Log) -> TableLike:
    """Returns tables of a base's active parameters, unmodified; or raises WrongBaseError."""
    try:
        tables = _tables_of(target, log.header) if isinstance(target, nn.Module) else target
        wrong = _difference(tables, target, log)
    except (TypeError, ValueError) as error:  # weights of a kind that no table takes
        wrong = str(error)
    if wrong:
        raise WrongBaseError(f"not the log's base: {wrong}")
    return tables


def _difference(tables: TableLike, target: nn.Module | TableLike, log: Log) -> str | None:
    """Returns a sentence on the first thing in which a target differs from the log's base."""
    # From cheap to dear: names and shapes cost nothing, a fingerprint reads every weight.
    header, base = log.header, log.header.identity
    if header.parameters and (wrong := header.parameter_difference(parameters_of(tables))):
        return wrong
    groups = {table.num_groups for table in each_table(tables)}
    if groups != {header.num_groups}:
        return f"{sorted(groups)} groups, expected {header.num_groups}"
    if layout_of(tables) != base.layout:
        return "names, shapes, dtypes or groups of the parameters differ"
    found = fingerprint(tables)
    if found != base.start:
        # The likeliest mistake gets a sentence of its own.
        if found == log.fingerprint:
            return f"the log is applied already, fingerprint {found:#018x} is that of its end"
        return (
            f"the fingerprint of its active parameters is {found:#018x}, expected "
            f"{base.start:#018x}; names, shapes and dtypes agree, values do not"
        )
    if isinstance(target, nn.Module) and base.origin is not None:
        found = model_fingerprint(recordable(target))
        if found != base.origin:
            return (
                "its active parameters agree, its frozen ones do not (the fingerprint of all is "
                f"{found:#018x}, expected {base.origin:#018x})"
            )
    return None


def _tables_of(model: nn.Module, header: LogHeader) -> DeviceTables:
    """Returns tables of the parameters that the log is about, as far as the model has them."""
    named = {canonical_name(name): p for name, p in model.named_parameters()}
    if header.parameters:
        groups = {p.name: p.group for p in header.parameters if p.name in named}
        return DeviceTables({name: named[name] for name in groups}, groups, header.num_groups)
    # A federation's server knows only the number of its blocks and their layout, whose hash (names,
    # shapes, dtypes, blocks) proves a guess right: all blocks, or the last ones, as a fine-tune
    # mostly trains; the first ones for completeness.
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
