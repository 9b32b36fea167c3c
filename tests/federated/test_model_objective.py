"""Clients that hold whole models, some with idle blocks on the host: the bits are the same."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from zorba.federated import (
    Client,
    FederationResult,
    LocalTransport,
    ModelObjective,
    Replica,
    Server,
    model_fingerprint,
    run_federation,
)
from zorba.hf import find_blocks
from zorba.offload import Offload
from zorba.optim import NoiseTerms, active_table
from zorba.tables import DeviceTables, each_table

import zorba_kernels as zk
from tests.federated.world import make_settings
from tests.hf.tiny import VOCABULARY, build, case_of

CASE = case_of("llama")
NAMES = ("ada", "bob", "cleo")
MASKS = [[True, False, False], [False, True, True], [False, False, True]]
LATER_MASKS = [[False, True, True], [True, False, False], [True, True, False]]


def batches(number: int) -> Any:
    def batch(round_number: int, step: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(100 * number + 10 * round_number + step)
        return torch.randint(3, VOCABULARY, (2, 6), generator=generator), 2

    return batch


def make_client(
    name: str, number: int, folder: Path | None, stack: ExitStack, dtype: torch.dtype,
    law: Any = "rademacher",
) -> Client:  # fmt: skip
    """A client with a model of its own; its blocks are offloaded where it has a folder."""
    model: nn.Module = build(CASE, dtype)
    blocks = find_blocks(model)
    groups = {p: b for b, block in enumerate(blocks) for p in block.parameters}
    named = {n: p for n, p in model.named_parameters() if n in groups}
    origin = model_fingerprint(model.named_parameters())
    table: Any = active_table(model, groups)
    if folder is not None:
        stack.enter_context(Offload(model, [blocks[0].name], folder=folder))
        table = DeviceTables(named, groups)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def losses(ids: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float().transpose(1, 2)
        return nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").mean(dim=1)

    # Rank-one noise is made inside of the forward: with the losses of examples, by row.
    rows = law == "rank1"
    replica = Replica(table, origin, distribution=law)
    objective = ModelObjective(model, table, batches(number), losses if rows else loss, law, rows)
    assert objective.by_row == rows
    return Client(name, replica, objective, by_row=rows)


def federate(
    path: Path, offloaded: bool, dtype: torch.dtype, law: Any
) -> tuple[FederationResult, set[int]]:
    """Five rounds: cleo joins late, masks change in mid-run, bob leaves for good."""
    with ExitStack() as stack:
        clients = {}
        for n, name in enumerate(NAMES):
            folder = path / f"{name}-host" if offloaded and n else None
            clients[name] = make_client(name, n, folder, stack, dtype, law)
        settings = make_settings(distribution=law, local_steps=2, num_perturbations=2)
        assert settings.directions_of(len(NAMES)) == "own"
        identity = clients["ada"].replica.identity

        def present(number: int) -> list[str]:
            return [n for n in NAMES if (n != "cleo" or number > 1) and (n != "bob" or number < 5)]

        for masks, rounds in ((MASKS, 3), (LATER_MASKS, 2)):
            server = Server(settings, identity, NAMES, masks, path / f"log-{offloaded}")
            result = run_federation(server, LocalTransport(clients), rounds, available=present)
            server.close()
        assert not result.failures, result.failures
        return result, {c.replica.fingerprint(fresh=True) for c in clients.values()}


@pytest.mark.parametrize("law", ["rademacher", "rank1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_clients_end_with_the_bits_of_resident_ones(
    tmp_path: Path, dtype: torch.dtype, law: str
) -> None:
    resident, mine = federate(tmp_path, False, dtype, law)
    offloaded, theirs = federate(tmp_path, True, dtype, law)
    assert resident.replicas_identical
    assert offloaded.replicas_identical
    assert len(mine | theirs) == 1
    assert [r.loss for r in resident.reports] == [r.loss for r in offloaded.reports]
    assert not any(r.failures for r in offloaded.reports)


@pytest.mark.parametrize("place", ["resident", "offloaded"])
def test_losses_of_examples_are_told_apart(tmp_path: Path, place: str) -> None:
    """Each is the loss that the example has alone; the last block is perturbed, two are reused."""
    coefs = torch.tensor([[0.0], [0.0], [1e-2]])
    noises = [NoiseTerms((5,), (0,), coefs), NoiseTerms((5,), (0,), -coefs)]
    with ExitStack() as stack:
        folder = tmp_path / "host" if place == "offloaded" else None
        inner: Any = make_client("ada", 0, folder, stack, torch.float32).objective
        model = inner.model

        def losses(ids: torch.Tensor) -> torch.Tensor:
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].transpose(1, 2)
            return nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").mean(dim=1)

        def told(rows: slice) -> list[Any]:
            def some(round_number: int, step: int) -> tuple[torch.Tensor, int]:
                ids = batches(0)(round_number, step)[0][rows]
                return ids, len(ids)

            law = ("rademacher", True)
            return list(ModelObjective(model, inner.table, some, losses, *law)(1, 0)[0](noises))

        both = np.array(told(slice(None)))  # [noises, examples]
        assert (both.shape, both.dtype) == ((2, 2), np.float64)
        assert not np.isclose(both[0], both[1], rtol=1e-5).any()
        np.testing.assert_allclose(both.mean(axis=1), inner(1, 0)[0](noises), rtol=1e-6)
        alone = [told(slice(n, n + 1)) for n in range(2)]
        np.testing.assert_allclose(both, np.concatenate(alone, axis=1), rtol=1e-6)


def test_blocks_follow_the_mask(tmp_path: Path) -> None:
    with ExitStack() as stack:
        client = make_client("ada", 0, tmp_path / "host", stack, torch.float32)
        objective: Any = client.objective
        offload = Offload.of(objective.model)
        assert offload is not None
        for active in ([0], [2], [0, 1, 2], [1]):
            evaluate, count = objective(1, 0)
            coefs = torch.zeros(3, 1)
            coefs[active] = 1e-2
            noises = [NoiseTerms((5,), (0,), coefs), NoiseTerms((5,), (0,), -coefs)]
            losses = evaluate(noises)
            assert losses[0] != losses[1]
            assert count == 2
            assert offload.active == tuple(f"model.layers.{b}" for b in active)


def test_a_plain_table_of_an_offloaded_model_is_refused(tmp_path: Path) -> None:
    model = build(CASE)
    table = active_table(model, dict.fromkeys(find_blocks(model)[0].parameters, 0))
    offload = Offload(model, ["model.layers.0"], folder=tmp_path)
    with offload, pytest.raises(ValueError, match="DeviceTables"):
        ModelObjective(model, table, batches(0), lambda ids: 0.0, "rademacher")


def test_checkpoint_of_an_offloaded_replica(tmp_path: Path) -> None:
    with ExitStack() as stack:
        client = make_client("ada", 0, tmp_path / "host", stack, torch.bfloat16)
        other = make_client("bob", 0, None, stack, torch.bfloat16)
        for table in each_table(client.replica.table):
            zk.add_noise_(table, 3, 0.1)
        client.replica.save(tmp_path / "checkpoint")
        other.replica.load(tmp_path / "checkpoint")
        assert other.replica.fingerprint(fresh=True) == client.replica.fingerprint(fresh=True)
