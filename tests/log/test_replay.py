"""Replay: the bits of the run, from the right base only."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from zorba import ZerothOrderSGD
from zorba.identity import identity_of
from zorba.log import (
    Log,
    LogEntry,
    LogError,
    LogFile,
    LogHeader,
    TrajectoryWriter,
    WrongBaseError,
    check_base,
    replay,
)
from zorba.optim import NoiseTerms

import zorba_kernels as zk
from tests.conftest import Random
from tests.kernels.bits import assert_same_bits
from tests.log.world import NAMES, make_table, make_updates, make_weights, record
from tests.optim.models import Tied, batch, loss_of


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_replay_has_the_bits_of_the_run(
    tmp_path: Path, dtype: torch.dtype, distribution: str, rounding: str, rng: Random
) -> None:
    weights = make_weights(dtype, rng)
    trained, rebuilt = make_table(weights), make_table(weights)
    updates = make_updates(80, rng)
    record(tmp_path / "run.zot", trained, updates, distribution, rounding)
    trajectory = Log.read(tmp_path / "run.zot")
    seen: list[tuple[int, int]] = []
    report = replay(rebuilt, trajectory, progress=lambda done, total: seen.append((done, total)))
    for mine, theirs in zip(rebuilt.entries, trained.entries, strict=True):
        assert_same_bits(mine.tensor, theirs.tensor)
    count = sum(update is not None for update in updates)
    assert (report.steps, report.verified) == (count, 79)
    assert report.fingerprint == zk.fingerprint(trained) != trajectory.header.identity.start
    assert seen == [(min(done, count), count) for done in range(64, count + 64, 64)]
    assert report.passes == len(seen)
    assert trajectory.num_skipped == 80 - count


def test_one_pass_equals_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rng: Random
) -> None:
    weights = make_weights(dtype, rng)
    record(tmp_path / "run.zot", make_table(weights), make_updates(40, rng))
    trajectory = Log.read(tmp_path / "run.zot")
    module = importlib.import_module("zorba.log.replay")  # its name is also a function's
    with_terms = sum(bool(entry.terms.seeds) for entry in trajectory.entries())
    for what, limit in (("ROUNDS_A_PASS", 1), ("ROUNDS_A_PASS", 7), ("COEFS_A_PASS", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(module, what, limit)
            report = replay(make_table(weights), trajectory)
        assert report.verified == 39
        if what == "ROUNDS_A_PASS":
            assert report.passes == -(-report.steps // limit)
        else:
            assert report.passes >= with_terms


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_model_is_rebuilt(
    tmp_path: Path, dtype: torch.dtype, momentum: float, generator: torch.Generator
) -> None:
    torch.manual_seed(3)
    model, base = Tied(dtype), Tied(dtype)
    model.embed.weight.requires_grad_(False)
    base.load_state_dict(model.state_dict())
    optimizer = ZerothOrderSGD(
        model, 1e-2, num_perturbations=2, weight_decay=0.1, momentum=momentum, seed=5
    )
    writer = TrajectoryWriter.create(
        tmp_path / "run.zot",
        optimizer.placement.table,
        5,
        "gaussian",
        "stochastic",
        model=model,
        settings={"lr": 1e-2},
    )
    optimizer.recorder = writer
    for step in range(12):
        ids, labels = batch(generator)
        bad = float("nan") if step in (0, 4, 11) else 1.0
        optimizer.step(lambda: bad * loss_of(model, ids, labels))  # noqa: B023
    writer.finish()
    trajectory = Log.read(tmp_path / "run.zot")
    assert (trajectory.num_steps, trajectory.num_skipped, trajectory.last) == (9, 3, 11)
    assert replay(base, trajectory).verified == 11
    for p, q in zip(base.parameters(), model.parameters(), strict=True):
        assert_same_bits(p, q)
    with pytest.raises(WrongBaseError, match="applied already"):
        replay(base, trajectory)


# --- Bases ---------------------------------------------------------------------------------------


@pytest.fixture
def trajectory(tmp_path: Path, rng: Random) -> Log:
    """Of the weights of ``base_weights``."""
    record(tmp_path / "run.zot", make_table(base_weights()), make_updates(5, Random(1)))
    return Log.read(tmp_path / "run.zot")


def base_weights() -> dict[str, torch.Tensor]:
    return make_weights(torch.bfloat16, Random(7))


def test_a_base_that_differs_is_named_and_left_alone(trajectory: Log) -> None:
    right = base_weights()
    flipped = right["layer.0.w"].clone()
    flipped.view(torch.int16)[3, 4] ^= 1
    cases = {
        "1 parameters are missing: embed": {n: w for n, w in right.items() if n != "embed"},
        "1 parameters are too many: extra": {**right, "extra": torch.ones(3)},
        r"'layer.1.w' has shape \(43, 3\)": {**right, "layer.1.w": torch.ones(43, 3)},
        "'norm' has dtype float32, expected bfloat16": {
            **right,
            "norm": right["norm"].float(),
        },
        "names, shapes and dtypes agree, values do not": {**right, "layer.0.w": flipped},
    }
    for told, weights in cases.items():
        table = zk.ParamTable(weights, {n: NAMES.get(n, 0) for n in weights}, num_groups=3)
        before = zk.fingerprint(table)
        with pytest.raises(WrongBaseError, match=told):
            replay(table, trajectory)
        assert zk.fingerprint(table) == before


def test_groups_of_a_table_must_agree(trajectory: Log) -> None:
    right = base_weights()
    with pytest.raises(WrongBaseError, match="'norm' has group 1, expected 0"):
        check_base(zk.ParamTable(right, {**NAMES, "norm": 1}), trajectory)
    with pytest.raises(WrongBaseError, match=r"\[4\] groups, expected 3"):
        check_base(zk.ParamTable(right, NAMES, num_groups=4), trajectory)


def test_frozen_weights_are_part_of_the_base(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    table = zk.ParamTable({n: p for n, p in model.named_parameters() if n.startswith("1.")})
    with TrajectoryWriter.create(
        tmp_path / "run.zot", table, 1, "gaussian", "nearest", model=model
    ) as writer:
        zk.add_noise_(table, [9], [0.5])
        writer.append(0, NoiseTerms((9,), (0,), torch.tensor([[0.5]])))
    trajectory = Log.read(tmp_path / "run.zot")
    zk.add_noise_(table, [9], [-0.5])
    torch.manual_seed(3)
    other = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    with torch.no_grad():
        other[0].bias[2] += 1.0
    with pytest.raises(WrongBaseError, match="frozen ones do not"):
        replay(other, trajectory)
    with torch.no_grad():
        other[0].bias.copy_(model[0].bias)
    assert replay(other, trajectory).verified == 0
    with pytest.raises(WrongBaseError, match="parameters are missing"):
        replay(nn.Linear(4, 3), trajectory)


def test_weights_that_were_changed_behind_the_record_are_told(tmp_path: Path) -> None:
    weights = base_weights()
    table = make_table(weights)
    with TrajectoryWriter.create(tmp_path / "run.zot", table, 1, "gaussian", "nearest"):
        table.entries[0].tensor.view(-1)[5] = 3.0
    trajectory = Log.read(tmp_path / "run.zot")
    with pytest.raises(LogError, match="something else than the recorded entries"):
        replay(make_table(weights), trajectory)
    assert not replay(make_table(weights), trajectory, verify=False).verified is not None


def test_an_unfinished_run_is_replayed_but_not_verified(tmp_path: Path, rng: Random) -> None:
    weights = make_weights(torch.float16, rng)
    trained, rebuilt = make_table(weights), make_table(weights)
    record(tmp_path / "run.zot", trained, make_updates(9, rng), finish=False)
    report = replay(rebuilt, Log.read(tmp_path / "run.zot"))
    assert report.verified is None
    assert report.fingerprint == zk.fingerprint(trained)


def test_tables_of_several_devices_add_up(tmp_path: Path, rng: Random) -> None:
    """Two tables stand for two devices: one trajectory, and one table replays it."""
    weights = make_weights(torch.bfloat16, rng)
    first = zk.ParamTable({"embed": weights["embed"].clone()}, num_groups=3)
    others = {n: w.clone() for n, w in weights.items() if n != "embed"}
    second = zk.ParamTable(others, {n: NAMES[n] for n in others}, num_groups=3)
    updates = [u for u in make_updates(9, rng) if u is not None]
    with TrajectoryWriter.create(
        tmp_path / "run.zot", [first, second], 11, "gaussian", "stochastic"
    ) as writer:
        for step, (terms, rounding_seed, decay) in enumerate(updates):
            for table in (first, second):
                zk.add_noise_(
                    table,
                    terms.seeds,
                    terms.coefs,
                    "gaussian",
                    "stochastic",
                    rounding_seed,
                    samples=terms.samples,
                    decay=decay,
                )
            writer.append(step, terms, rounding_seed, decay)
    trajectory = Log.read(tmp_path / "run.zot")
    assert replay(make_table(weights), trajectory).verified == len(updates) - 1
    assert trajectory.header.identity.start == zk.fingerprint(make_table(weights))
    with pytest.raises(WrongBaseError, match="groups"):
        check_base([first, zk.ParamTable(others, num_groups=2)], trajectory)


def test_the_last_fingerprint_of_a_federation_is_compared(tmp_path: Path) -> None:
    """Entries tell the weights before them: what follows the last that tells is not verified."""
    table, rebuilt = make_table(base_weights()), make_table(base_weights())
    header = LogHeader(1, identity_of(table, None), "gaussian", "stochastic")
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


def test_noise_of_another_version_is_refused(trajectory: Log, tmp_path: Path) -> None:
    header = replace(trajectory.header, noise_version=2)
    (tmp_path / "new.zot").write_bytes(header.encode())
    with pytest.raises(LogError, match="noise version 2, this package makes version 1"):
        Log.read(tmp_path / "new.zot")
