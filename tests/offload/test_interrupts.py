"""Ctrl-C at any line of a step whose evaluations run side by side."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zorba import ZerothOrderSGD
from zorba.offload import Offload

from tests.optim.models import same_bits, snapshot
from tests.optim.test_interrupts import ends, traced

LINES = 60


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Model(nn.Module):
    """Four blocks, the first reused, and a weight that is used without its module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.direct = nn.Linear(4, 4, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return hidden @ self.direct.weight


def test_at_any_line(tmp_path: Path, rng: Any) -> None:
    """At some lines of each run: at every one of them it takes minutes."""
    torch.manual_seed(1)
    model, x = Model(), torch.randn(3, 4)
    for number in (0, 3):
        model.layers[number].requires_grad_(False)
    active = ["layers.1", "layers.2"]

    def closure() -> Tensor:
        return model(x).square().sum()

    def make() -> ZerothOrderSGD:
        optimizer = ZerothOrderSGD(model, lr=0.5)
        optimizer.step(closure)
        return optimizer

    with Offload(model, active, folder=tmp_path):
        start = snapshot(model)
        addresses = [p.data_ptr() for p in model.parameters()]
        forwards = {n: m.__dict__.get("forward") for n, m in model.named_modules()}
        for _ in range(4):  # until every block has been in both buffers
            make()
        model.load_state_dict(start)
        optimizer = make()
        before = snapshot(model)
        lines = traced(lambda: optimizer.step(closure))
        after = snapshot(model)
        assert not same_bits(model, before)
        outcomes = set()
        candidates = ends(lines)
        some = torch.randperm(len(candidates), generator=rng.generator)[:LINES].tolist()
        for at in [len(lines) - 20, *(candidates[number] for number in some)]:
            model.load_state_dict(start)
            optimizer = make()
            try:
                ran = traced(lambda: optimizer.step(closure), at)  # noqa: B023
                # the thread that copies is faster at times, and some lines fewer wait for it
                assert len(ran) <= at, f"line {at} of {len(ran)}: no KeyboardInterrupt"
            except KeyboardInterrupt:
                pass
            taken = optimizer.param_groups[0]["step"] == 2
            assert same_bits(model, after if taken else before), f"line {at}"
            assert [p.data_ptr() for p in model.parameters()] == addresses, f"line {at}"
            left = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
            assert not left, f"line {at}"
            now = {n: m.__dict__.get("forward") for n, m in model.named_modules()}
            assert now == forwards, f"line {at}"
            outcomes.add(taken)
        assert outcomes == {False, True}
        assert len(lines) > 500
