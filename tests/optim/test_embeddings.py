"""Embeddings in scratch: only the rows in use are made, with the bits of the whole table's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zorba import ZerothOrderSGD

from tests.optim.models import scratch_bytes, untouched
from tests.optim.test_scratch import IDS


class Reader(nn.Module):
    """An embedding that nothing else uses, unless it is tied."""

    def __init__(self, tied: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(500, 12, **options)
        self.head = nn.Linear(12, 500, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(input=ids)))


def by_rows(model: nn.Module, optimizer: ZerothOrderSGD) -> bool:
    return model.get_submodule("embed") in optimizer.placement._embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "rank1"])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}], ids=["", "padding"])
def test_rows_in_use_are_those_of_the_whole_table(
    dtype: torch.dtype, distribution: str, options: dict[str, int], rng: Any
) -> None:
    found = []
    ids = torch.randint(0, 9, (4, 7), generator=rng.generator)  # some often, and 0
    ids[0, 0] = 499
    for whole in (False, True):
        model = Reader(**options).to(dtype)
        if whole:
            model.embed.register_forward_hook(lambda *_: None)  # of whom nothing is known
        optimizer = ZerothOrderSGD(
            model, lr=0.1, eps=0.1, num_perturbations=2, momentum=0.5, distribution=distribution
        )
        for _ in range(3):
            optimizer.step(lambda: model(ids).float().square().mean())  # noqa: B023
            found.append(optimizer.last_step.scalars)
        assert by_rows(model, optimizer) != whole
    assert found[:3] == found[3:]
    assert all(g != 0 for scalars in found for g in scalars)


@pytest.mark.parametrize(
    "options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}, {"tied": True}]
)
def test_other_embeddings_are_made_as_a_whole(options: dict[str, Any]) -> None:
    model = Reader(**options)
    optimizer = ZerothOrderSGD(model, lr=0.0)
    optimizer.step(lambda: model(IDS).square().mean())
    assert not by_rows(model, optimizer)


def test_an_embedding_that_is_tied_later_is_made_as_a_whole() -> None:
    """Or untied: the scratch has the size that it needs."""
    model = Reader()
    model.head = nn.Linear(12, 3, bias=False)
    optimizer = ZerothOrderSGD(model, lr=0.0)
    for hooked in (False, True, False):
        handle = model.embed.register_forward_hook(lambda *_: None) if hooked else None
        optimizer.step(lambda: model(IDS).square().mean())
        if handle is not None:
            handle.remove()
        assert by_rows(model, optimizer) != hooked
        rows = 500 if hooked else 3
        assert scratch_bytes(optimizer) == (rows * 12 * 4 + 63) // 64 * 64
    assert untouched(model)


def test_wrong_ids_and_no_ids() -> None:
    model = Reader()
    optimizer = ZerothOrderSGD(model, lr=0.0)
    assert float(optimizer.step(lambda: model(IDS[:0]).sum())) == 0.0
    for ids in (torch.tensor([500]), torch.tensor([-1])):
        with pytest.raises((IndexError, RuntimeError)):
            optimizer.step(lambda: model(ids).sum())  # noqa: B023
    assert untouched(model)
