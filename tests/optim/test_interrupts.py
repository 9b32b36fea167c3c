"""Ctrl-C at every line of a step: the step was taken, or it was not; never anything between."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import zorba.offload
import zorba.optim
from torch import Tensor, nn
from zorba import ZerothOrderSGD

from tests.optim.models import assert_close, same_bits, snapshot, untouched

SOURCES = (str(Path(zorba.optim.__file__).parent), str(Path(zorba.offload.__file__).parent))


class Model(nn.Module):
    """Blocks to reuse, a tied weight, an embedding, and one that is used without its module."""

    def __init__(self, direct: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 4, bias=False)
        self.twin = nn.Linear(4, 4, bias=False)
        self.twin.weight = self.head.weight
        self.direct = nn.Linear(4, 4, bias=False) if direct else None
        self.embed = nn.Embedding(9, 4) if direct else None
        self.layers[0].requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        if self.embed is not None:
            hidden = hidden + self.embed(torch.arange(len(hidden)))
        hidden = self.twin(torch.tanh(self.head(hidden)))
        return hidden if self.direct is None else hidden @ self.direct.weight


def traced(call: Callable[[], object], at: int | None = None) -> list[tuple[str, int]]:
    """Runs the call and sends SIGINT at its line with that number; returns the lines that ran."""
    lines: list[tuple[str, int]] = []

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            if len(lines) == at:
                sys.settrace(before)  # nobody looks at what runs from here on
                os.kill(os.getpid(), signal.SIGINT)
            lines.append((frame.f_code.co_filename, frame.f_lineno))
        return local

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(SOURCES) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines


def ends(lines: list[tuple[str, int]], in_turn: bool = False) -> list[int]:
    """Numbers of the first and the last run of every line; ``in_turn`` of one of the two."""
    first = {line: at for at, line in reversed(list(enumerate(lines)))}
    last = {line: at for at, line in enumerate(lines)}
    if in_turn:
        return sorted((first, last)[n % 2][line] for n, line in enumerate(sorted(first)))
    return sorted({*first.values(), *last.values()})


class Fusable(Model):
    """The placement "fused" refuses weights that are used without their module; it has norms."""

    def __init__(self) -> None:
        super().__init__(direct=False)
        self.layers[1] = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), Scale())


class Scale(nn.Module):
    """A norm of a kind that is not torch's: its weight is exchanged for one a row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.weight


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize(
    ("placement", "directions"), [("scratch", "shared"), ("fused", "shared"), ("fused", "own")]
)
def test_weights_are_those_of_before_or_after(placement: str, directions: str, first: bool) -> None:
    """In the later step a line that runs in a loop is stopped at its first and at its last run."""
    torch.manual_seed(1)
    model = (Fusable() if placement == "fused" else Model()).to(torch.bfloat16)
    x = torch.randn(3, 4).to(torch.bfloat16)
    addresses = [p.data_ptr() for p in model.parameters()]

    options = {"placement": placement, "directions": directions, "examples_per_direction": 2}
    # Without reuse both signs of own directions are one batch.
    options["prefix_reuse"] = directions == "shared"

    def closure(batch: Tensor) -> Tensor:
        losses = model(batch).float().square().sum(1)
        return losses if directions == "own" else losses.sum()

    def make() -> ZerothOrderSGD:
        return ZerothOrderSGD(model, lr=0.5, momentum=0.5, weight_decay=0.1, **options)

    optimizer = make()
    if not first:
        optimizer.step(closure, x)
    before, fresh = snapshot(model), optimizer.state_dict()
    lines = traced(lambda: optimizer.step(closure, x))
    after, done = snapshot(model), optimizer.state_dict()
    assert not same_bits(model, before)
    candidates = ends(lines, in_turn=first)
    assert len(candidates) > 100
    outcomes = set()
    for at in candidates:
        model.load_state_dict(before, strict=False)
        # A later step is tried again on the same optimizer: it must be as good as before.
        optimizer = make() if first else optimizer
        optimizer.load_state_dict(fresh)
        with pytest.raises(KeyboardInterrupt):
            traced(lambda: optimizer.step(closure, x), at)  # noqa: B023
        state = optimizer.state_dict()
        taken = state["param_groups"][0]["step"] == done["param_groups"][0]["step"]
        assert same_bits(model, after if taken else before), f"line {lines[at]}"
        assert state == (done if taken else fresh), f"line {lines[at]}"
        assert [p.data_ptr() for p in model.parameters()] == addresses, f"line {lines[at]}"
        assert untouched(model), f"line {lines[at]}"
        outcomes.add(taken)
    assert outcomes == {False, True}


@pytest.mark.parametrize("two_pass", [False, True])
def test_in_place(two_pass: bool) -> None:
    """To rounding: weights are those of before or after, without a perturbation of 0.1."""
    torch.manual_seed(1)
    model = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    start = snapshot(model)

    def closure() -> Tensor:
        return model(x).square().sum()

    def make() -> ZerothOrderSGD:
        return ZerothOrderSGD(model, lr=0.05, eps=0.1, placement="inplace", two_pass=two_pass)

    optimizer = make()
    lines = traced(lambda: optimizer.step(closure))
    optimizer.flush()
    after = snapshot(model)
    for at in ends(lines):
        model.load_state_dict(start)
        optimizer = make()
        with pytest.raises(KeyboardInterrupt):
            traced(lambda: optimizer.step(closure), at)  # noqa: B023
        optimizer.flush()
        expected = after if optimizer.param_groups[0]["step"] else start
        assert_close(model, expected, "steps in place")
