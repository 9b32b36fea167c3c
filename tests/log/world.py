"""Small tables, and runs and rounds to record."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from zorba.identity import ModelIdentity
from zorba.log import Log, LogEntry, LogHeader, TrajectoryWriter, decode_entries, encode_entry
from zorba.log.header import decode_header
from zorba.optim import InplacePlacement, NoiseTerms, step_seed

import zorba_kernels as zk
from tests.conftest import Random
from tests.kernels.bits import assert_same_bits

RUN_SEED = 11
LAW = ("rademacher", "stochastic")
NAMES = {"embed": 0, "layer.0.w": 1, "layer.1.w": 2, "norm": 0}
GROUPS = 3


def make_weights(dtype: torch.dtype, rng: Random) -> dict[str, Tensor]:
    shapes = {"embed": (37, 16), "layer.0.w": (65, 33), "layer.1.w": (129,), "norm": ()}
    return {name: rng.weights(shapes[name], dtype) for name in NAMES}


WEIGHTS = make_weights(torch.bfloat16, Random(1))


def make_table(weights: dict[str, Tensor] = WEIGHTS) -> zk.ParamTable:
    return zk.ParamTable({n: w.clone() for n, w in weights.items()}, NAMES)


# Terms, rounding seed and decay of a step; None for a skipped one.
Update = tuple[NoiseTerms, int | None, Tensor | None] | None


def make_updates(count: int, rng: Random) -> list[Update]:
    """Steps of every kind: plain, groups apart, momentum, decay, foreign seeds, skipped."""
    updates: list[Update] = []
    for step in range(count):
        kind = rng.integer(3)
        own = step_seed(RUN_SEED, step)
        if kind == 0:
            updates.append(None)
            continue
        seeds, samples = [own] * 2, [0, 1]
        if kind in (1, 2):  # momentum, oldest first or newest first
            past = range(max(0, step - 3), step + 1)
            past = past if kind == 1 else past[::-1]
            seeds = [step_seed(RUN_SEED, s) for s in past for _ in range(2)]
            samples = [0, 1] * len(past)
        elif kind == 3:  # anything at all
            seeds, samples = rng.integers(4), [r % 5 for r in rng.integers(4, 31)]
        elif kind == 4:
            seeds, samples = [], []
        coefs = 0.1 * rng.coefs(GROUPS, len(seeds))
        if kind in (1, 5):
            coefs[:] = coefs[:1].clone()
        decay = rng.coefs(GROUPS).abs() * 0.1 if kind in (2, 4, 6) else None
        rounding_seed = None if kind == 7 else rng.integer(64) if kind == 6 else own
        updates.append((NoiseTerms(tuple(seeds), tuple(samples), coefs), rounding_seed, decay))
    return updates


def write(writer: TrajectoryWriter, updates: list[Update], first: int = 0) -> None:
    for step, update in enumerate(updates[first:], first):
        writer.skip(step) if update is None else writer.append(step, *update)


def record(
    path: Path, table: zk.ParamTable, updates: list[Update], law: tuple[str, str] = LAW
) -> Path:
    with TrajectoryWriter.create(path, table, RUN_SEED, *law) as writer:
        write(writer, updates)
        placement = InplacePlacement(table, law[0])
        for terms, rounding_seed, decay in filter(None, updates):
            placement.update(terms, law[1], rounding_seed, decay)
    return path


# --- Of a federation -----------------------------------------------------------------------------

BLOCKS = 4
HEADER = LogHeader(5, ModelIdentity(1, 1 << 63, 3, 4, BLOCKS), *LAW)


def make_entry(number: int, empty: bool = False) -> LogEntry:
    """P = 3; block 2 is not covered, and blocks 0 and 3 have the same clients."""
    if empty:
        return LogEntry(number, NoiseTerms.none(BLOCKS), 0)
    coefs = torch.arange(3.0) + torch.tensor([[0.5], [1.5], [0.0], [0.5]])
    coefs[2] = 0.0
    terms = NoiseTerms((1 << 63 | number,) * 3, (0, 1, 2), coefs)
    return LogEntry(number, terms, 1000 + number, None, 70 + number, 9)


def ends(path: Path) -> list[int]:
    """Offset at which the header, each entry and the end of a run end."""
    data = path.read_bytes()
    log = Log(data)
    known = [decode_header(data)[1]]
    for entry in log.entries():
        known.append(known[-1] + len(encode_entry(entry, log.header.log_id, log.header.run_seed)))
    return known if log.fingerprint is None else [*known, len(data)]


def assert_comes_back(entry: LogEntry, run_seed: int | None = None) -> bytes:
    data = encode_entry(entry, 5, run_seed)
    groups = len(entry.terms.coefs)
    assert_same_entry(decode_entries(data, 1, entry.number, groups, 5, run_seed)[0], entry)
    return data


def assert_same_entry(mine: LogEntry, theirs: LogEntry) -> None:
    for what in ("number", "rounding_seed", "base", "mask_version"):
        assert getattr(mine, what) == getattr(theirs, what), what
    assert (mine.terms.seeds, mine.terms.samples) == (theirs.terms.seeds, theirs.terms.samples)
    assert_same_bits(mine.terms.coefs, theirs.terms.coefs)
    assert (mine.decay is None) == (theirs.decay is None)
    if mine.decay is not None and theirs.decay is not None:
        assert_same_bits(mine.decay, theirs.decay)
