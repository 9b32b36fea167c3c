"""Replay: the bits of the run, from the right base only."""

from __future__ import annotations

import importlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from zorba import ZerothOrderSGD
from zorba.identity import identity_of
from zorba.log import Log, LogEntry, LogError, LogFile, TrajectoryWriter, WrongBaseError, replay
from zorba.optim import NoiseTerms

import zorba_kernels as zk
from tests.conftest import Random
from tests.kernels.bits import assert_same_bits
from tests.log.world import (
    HEADER,
    LAW,
    NAMES,
    make_table,
    make_updates,
    make_weights,
    record,
    write,
)
from tests.optim.models import Tied, batch, loss_of

ALL_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@ALL_DTYPES
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_replay_has_the_bits_of_the_run(
    tmp_path: Path, dtype: torch.dtype, distribution: str, rounding: str, rng: Random
) -> None:
    weights = make_weights(dtype, rng)
    trained, rebuilt = make_table(weights), make_table(weights)
    updates = make_updates(80, rng)
    log = Log.read(record(tmp_path / "run.zot", trained, updates, (distribution, rounding)))
    seen: list[tuple[int, int]] = []
    report = replay(rebuilt, log, progress=lambda done, total: seen.append((done, total)))
    for mine, theirs in zip(rebuilt.entries, trained.entries, strict=True):
        assert_same_bits(mine.tensor, theirs.tensor)
    count = sum(update is not None for update in updates)
    assert (report.steps, report.verified, log.num_skipped) == (count, 79, 80 - count)
    assert report.fingerprint == zk.fingerprint(trained) != log.header.identity.start
    assert seen == [(min(done, count), count) for done in range(64, count + 64, 64)]
    assert report.passes == len(seen)


@ALL_DTYPES
def test_one_pass_equals_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rng: Random
) -> None:
    weights = make_weights(dtype, rng)
    log = Log.read(record(tmp_path / "run.zot", make_table(weights), make_updates(40, rng)))
    module = importlib.import_module("zorba.log.replay")  # its name is also a function's
    steps, terms = log.num_steps, sum(bool(entry.terms.seeds) for entry in log.entries())
    for what, limit, changing in (("ROUNDS", 1, steps), ("ROUNDS", 7, steps), ("COEFS", 1, terms)):
        with monkeypatch.context() as patch:
            patch.setattr(module, f"{what}_A_PASS", limit)
            report = replay(make_table(weights), log)
        assert report.verified == 39
        assert report.passes >= changing / limit


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("placement", "directions"), [("scratch", "shared"), ("scratch", "own"), ("fused", "own")]
)
def test_a_trained_model_is_rebuilt(
    tmp_path: Path,
    placement: str,
    directions: str,
    dtype: torch.dtype,
    momentum: float,
    generator: torch.Generator,
) -> None:
    torch.manual_seed(3)
    model, base, path = Tied(dtype), Tied(dtype), tmp_path / "run.zot"
    model.embed.weight.requires_grad_(False)
    base.load_state_dict(model.state_dict())
    options = {"placement": placement, "directions": directions, "examples_per_direction": 3}
    if directions == "own":
        options |= {"clip": 1.0} if momentum else {"normalize": True}
    optimizer = ZerothOrderSGD(
        model, 1e-2, num_perturbations=2, weight_decay=0.1, momentum=momentum, seed=5, **options
    )
    table, noise = optimizer.placement.table, optimizer.placement.distribution
    with TrajectoryWriter.create(path, table, 5, noise, "stochastic", model=model) as writer:
        optimizer.recorder = writer
        for step in range(12):
            ids, labels = batch(generator)
            bad = float("nan") if step in (0, 4, 11) else 1.0
            reduction = "mean" if directions == "shared" else "none"
            # of each of four examples, of nine tokens
            optimizer.step(lambda: bad * by_example(loss_of(model, ids, labels, reduction)))  # noqa: B023
            assert len(optimizer.last_step.scalars) == (2 if directions == "shared" else 4)
    log = Log.read(path)
    assert (log.num_steps, log.num_skipped, log.last) == (9, 3, 11)
    assert replay(base, log).verified == 11
    for p, q in zip(base.parameters(), model.parameters(), strict=True):
        assert_same_bits(p, q)
    with pytest.raises(WrongBaseError, match="applied already"):
        replay(base, log)


def by_example(losses: Tensor) -> Tensor:
    """The mean of the tokens of each of four examples, or the mean of all, as it is."""
    return losses.view(4, 9).mean(1) if losses.ndim else losses


# --- Bases ---------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path, rng: Random) -> Log:
    return Log.read(record(tmp_path / "run.zot", make_table(base_weights()), make_updates(5, rng)))


def base_weights() -> dict[str, Tensor]:
    return make_weights(torch.bfloat16, Random(7))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"embed": None}, "1 parameters are missing: embed"),
        ({"head": torch.ones(3)}, "1 parameters are too many: head"),
        ({"embed": base_weights()["embed"].T}, r"'embed' has shape \(16, 37\), expected \(37, 16"),
        ({"norm": base_weights()["norm"].float()}, "'norm' has dtype float32, expected bfloat16"),
        ({"layer.0.w": base_weights()["layer.0.w"].neg()}, "dtypes agree, values do not"),
    ],
    ids=["missing", "too many", "shape", "dtype", "values"],
)
def test_a_base_that_differs_is_named_and_left_alone(
    log: Log, change: dict[str, Tensor | None], told: str
) -> None:
    weights = {n: w for n, w in (base_weights() | change).items() if w is not None}
    table = zk.ParamTable(weights, {n: NAMES.get(n, 0) for n in weights}, num_groups=3)
    before = zk.fingerprint(table)
    with pytest.raises(WrongBaseError, match=told):
        replay(table, log)
    assert zk.fingerprint(table) == before


def test_groups_of_a_table_must_agree(log: Log) -> None:
    right = base_weights()
    with pytest.raises(WrongBaseError, match="'norm' has group 1, expected 0"):
        replay(zk.ParamTable(right, {**NAMES, "norm": 1}), log)
    with pytest.raises(WrongBaseError, match=r"\[4\] groups, expected 3"):
        replay(zk.ParamTable(right, NAMES, num_groups=4), log)


def test_frozen_weights_are_part_of_the_base(tmp_path: Path) -> None:
    model, other = (nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    table = zk.ParamTable({n: p for n, p in model.named_parameters() if n.startswith("1.")})
    path = tmp_path / "run.zot"
    with TrajectoryWriter.create(path, table, 1, "gaussian", "nearest", model=model) as writer:
        zk.add_noise_(table, [9], [0.5])
        writer.append(0, NoiseTerms.single(9, 0, [0.5]))
    log = Log.read(path)
    with torch.no_grad():
        other[0].bias[2] += 1.0
    with pytest.raises(WrongBaseError, match="frozen ones do not"):
        replay(other, log)
    with torch.no_grad():
        other[0].bias.copy_(model[0].bias)
    assert replay(other, log).verified == 0
    for stranger in (nn.Linear(4, 3), other.double()):
        with pytest.raises(WrongBaseError, match="not the log's base"):
            replay(stranger, log)


def test_weights_that_were_changed_behind_the_record_are_told(tmp_path: Path) -> None:
    weights, path = base_weights(), tmp_path / "run.zot"
    table = make_table(weights)
    with TrajectoryWriter.create(path, table, 1, "gaussian", "nearest"):
        table.entries[0].tensor.view(-1)[5] = 3.0
    with pytest.raises(LogError, match="something else than the recorded entries"):
        replay(make_table(weights), Log.read(path))
    assert replay(make_table(weights), Log.read(path), verify=False).verified is None


def test_an_unfinished_run_is_replayed_but_not_verified(tmp_path: Path, rng: Random) -> None:
    table, path = make_table(base_weights()), tmp_path / "run.zot"
    with suppress(KeyboardInterrupt), TrajectoryWriter.create(path, table, 1, *LAW) as writer:
        write(writer, make_updates(9, rng))
        raise KeyboardInterrupt
    log = Log.read(path)
    report = replay(table, log)
    assert (log.fingerprint, log.last, report.verified) == (None, 8, None)
    assert report.fingerprint == zk.fingerprint(table)


def test_tables_of_several_devices_add_up(tmp_path: Path, rng: Random) -> None:
    """Two tables stand for two devices: one table makes the trajectory, and both replay it."""
    updates = make_updates(9, rng)
    log = Log.read(record(tmp_path / "run.zot", make_table(base_weights()), updates))
    first = {n: w for n, w in base_weights().items() if n == "embed"}
    others = {n: w for n, w in base_weights().items() if n != "embed"}
    tables = [
        zk.ParamTable(part, {n: NAMES[n] for n in part}, num_groups=3) for part in (first, others)
    ]
    assert identity_of(tables, None) == log.header.identity
    assert replay(tables, log).verified == 8
    tables[1] = zk.ParamTable(others, {n: NAMES[n] for n in others}, num_groups=4)
    with pytest.raises(WrongBaseError, match=r"\[3, 4\] groups"):
        replay(tables, log)


def test_the_last_fingerprint_of_a_federation_is_compared(tmp_path: Path) -> None:
    """Entries tell the weights before them: what follows the last that tells is not verified."""
    table, rebuilt = make_table(base_weights()), make_table(base_weights())
    header = replace(HEADER, identity=identity_of(table, None), distribution="gaussian")
    terms = [NoiseTerms((7,), (t,), torch.ones(3, 1)) for t in range(5)]
    with LogFile(tmp_path / "job.log", header) as log:
        for t, base in ((1, True), (2, True), (3, True), (4, False)):
            log.append(LogEntry(t, terms[t], 7, base=zk.fingerprint(table) if base else None))
            zk.add_noise_(table, [7], terms[t].coefs, rounding="stochastic", samples=[t])
        log.append(LogEntry(5, NoiseTerms.none(3), 0))
    report = replay(rebuilt, Log.read(tmp_path / "job.log"))
    assert (report.verified, report.steps, report.passes) == (2, 4, 2)
    assert report.fingerprint == zk.fingerprint(table)
    with LogFile(tmp_path / "wrong.log", header) as log:
        log.append(LogEntry(1, terms[1], 7))
        log.append(LogEntry(2, terms[2], 7, base=99))
    with pytest.raises(LogError, match="after entry 1 the fingerprint is"):
        replay(make_table(base_weights()), Log.read(tmp_path / "wrong.log"))
