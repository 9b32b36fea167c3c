"""What a step must do, computed on deep copies with explicit perturbations."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from zorba import ZerothOrderSGD
from zorba.optim import active_table

import zorba_kernels as zk
from zorba_kernels.noise import stream_of

LossOf = Callable[[nn.Module], Tensor]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.detach().clone() for name, t in tensors}


def changed(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    def bits(t: Tensor) -> Tensor:  # NaNs and signs of zeros count
        return t.contiguous().reshape(-1).view(torch.uint8)

    after = state_of(model)
    assert after.keys() == before.keys()
    return [name for name, t in before.items() if not torch.equal(bits(t), bits(after[name]))]


@torch.no_grad()
def explicit_scalar(
    model: nn.Module, loss_of: LossOf, seed: int, eps: float, in_place: bool = False
) -> float:
    """The central difference along the step's noise, from copies of the model that carry it.

    In place the second loss is taken at ``(w + eps z) - 2 eps z``, rounded twice.
    """
    plus = copy.deepcopy(model)
    zk.add_noise_(active_table(plus), seed, eps)
    first = float(loss_of(plus))
    minus = plus if in_place else copy.deepcopy(model)
    zk.add_noise_(active_table(minus), seed, -2 * eps if in_place else -eps)
    return (first - float(loss_of(minus))) / (2 * eps)


def explicit_update(
    before: dict[str, Tensor], trained: set[str], seed: int, scalar: float, lr: float
) -> dict[str, Tensor]:
    """``w - lr g z`` by hand for float32; by the noise op, stochastically rounded, for the others.

    That all backends make the same noise, and round alike, is tested with them.
    """
    coef = torch.tensor(-lr * scalar, dtype=torch.float64).to(torch.float32)
    after = dict(before)
    for name in trained:
        w = before[name]
        if w.dtype == torch.float32:
            after[name] = w + coef * zk.noise(w.shape, seed=seed, stream=stream_of(name))
        else:
            after[name] = torch.empty_like(w)
            source, target = zk.ParamTable({name: w}), zk.ParamTable({name: after[name]})
            zk.add_noise(source, target, seed, coef.item(), rounding="stochastic")
    return after


def check_step(model: nn.Module, loss_of: LossOf, lr: float, eps: float) -> None:
    """One step of the default placement: the scalar, the update, and nothing but the update.

    Then one with lr = 0, which changes no bit.
    """
    before = state_of(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    untouched = copy.deepcopy(model)
    optimizer = ZerothOrderSGD(model, lr=lr, eps=eps)
    optimizer.step(lambda: loss_of(model))
    report = optimizer.last_step
    assert report is not None
    assert not report.skipped
    (scalar,) = report.scalars
    assert scalar != 0.0, "a step of no length would prove nothing"
    assert scalar == explicit_scalar(untouched, loss_of, report.seed, eps)
    wanted = explicit_update(before, trained, report.seed, scalar, lr)
    assert changed(model, wanted) == []
    assert changed(model, before), "the step must move something"
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(lambda: loss_of(model))
    assert changed(model, wanted) == []
