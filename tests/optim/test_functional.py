"""Parameters that are used without the forward of their module, or not at all."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from zorba import ZerothOrderSGD
from zorba.optim import (
    InplacePlacement,
    NoiseTerms,
    ScratchPlacement,
    UnreachedParameterError,
    active_table,
)
from zorba.optim.owners import find_owners
from zorba.optim.probe import Probe

import zorba_kernels as zk
from tests.optim.models import same_bits, snapshot
from tests.tolerances import bound


class Functional(nn.Module):
    """A head that multiplies with the embedding's weight, and a layer that is used directly."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layer = nn.Linear(8, 8, bias=False)
        self.plain = nn.Linear(8, 8)
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(nn.functional.linear(self.embed(ids), self.layer.weight))
        return self.plain(hidden) @ self.embed.weight.T


class Experts(nn.Module):
    """Two experts, of which the input decides which one runs."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor, which: int) -> Tensor:
        return self.experts[which](x)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).float().square().mean()


def test_a_probe_tells_uses_apart() -> None:
    model = Functional()
    model.unused = nn.Linear(3, 3)
    table = active_table(model)
    probe = Probe(InplacePlacement(table, "gaussian", find_owners(model, table)))
    with torch.no_grad(), probe.watch():
        model(torch.arange(5))
    assert probe.functional == {"embed.weight", "layer.weight"}
    assert probe.unread == {"unused.weight", "unused.bias"}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["central", "forward"])
def test_scratch_shows_them_perturbed(dtype: torch.dtype, estimator: str) -> None:
    """Losses equal those of weights perturbed by hand, in the first step and in later ones."""
    model = Functional(dtype)
    ids = torch.tensor([1, 5, 1, 7])
    eps = 0.05
    optimizer = ZerothOrderSGD(model, lr=1e-3, eps=eps, estimator=estimator, rounding="nearest")
    for _ in range(3):
        start = snapshot(model)
        seen: list[float] = []

        def closure(seen: list[float] = seen) -> Tensor:
            loss = loss_of(model, ids)
            seen.append(float(loss))
            return loss

        optimizer.step(closure)
        report, after = optimizer.last_step, snapshot(model)
        assert report is not None
        expected = []
        for scale in (eps, -eps) if estimator == "central" else (0.0, eps):
            model.load_state_dict(start)
            zk.add_noise_(active_table(model), report.seed, scale)
            with torch.no_grad():
                expected.append(float(loss_of(model, ids)))
        assert seen[-2:] == expected
        model.load_state_dict(start)
        zk.add_noise_(active_table(model), report.seed, -1e-3 * report.scalars[0])
        assert same_bits(model, after)


def test_held_parameters_cost_their_own_scratch_once() -> None:
    model = Functional()
    optimizer = ZerothOrderSGD(model, lr=0.1)
    for _ in range(4):
        optimizer.step(lambda: loss_of(model, torch.arange(4)))
    placement = optimizer.placement
    assert isinstance(placement, ScratchPlacement)
    held = 384 + 256  # the embedding, 352 bytes in steps of 64, and the layer
    assert placement.scratch_bytes == held + 256 + 64  # and the largest module: plain


def test_weights_are_exact_after_steps_without_learning_rate() -> None:
    model = Functional(torch.bfloat16)
    before = snapshot(model)
    addresses = [p.data_ptr() for p in model.parameters()]
    optimizer = ZerothOrderSGD(model, lr=0.0, eps=0.1)
    for _ in range(50):
        optimizer.step(lambda: loss_of(model, torch.arange(4)))
    assert same_bits(model, before)
    assert [p.data_ptr() for p in model.parameters()] == addresses


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_closure_that_raises(at: int, error: type[BaseException]) -> None:
    """Also in the first evaluation, which is watched, and in the one that repeats it."""
    model = Functional()
    before = snapshot(model)
    addresses = [p.data_ptr() for p in model.parameters()]
    calls = []

    def closure() -> Tensor:
        loss = loss_of(model, torch.arange(4))
        calls.append(1)
        if len(calls) == at:
            raise error("injected")
        return loss

    optimizer = ZerothOrderSGD(model, lr=0.0)

    def two_steps() -> None:
        optimizer.step(closure)
        optimizer.step(closure)

    with pytest.raises(error, match="injected"):
        two_steps()
    assert same_bits(model, before)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    optimizer.step(closure)


def test_experts_that_no_input_reaches() -> None:
    """A warning that names them; other inputs may reach them later."""
    model = Experts()
    x = torch.randn(3, 4)
    optimizer = ZerothOrderSGD(model, lr=0.01)
    with pytest.warns(UserWarning, match=r"experts\.1\.weight"):
        optimizer.step(lambda: model(x, 0).square().mean())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: model(x, 1).square().mean())
    assert optimizer.last_step is not None
    assert optimizer.last_step.scalars[0] != 0.0, "the second expert was perturbed"


def test_a_placement_of_its_own_refuses_what_it_does_not_reach() -> None:
    """Without the optimizer's probe nobody has said how the parameters are used."""
    model = Functional()
    placement = ScratchPlacement(model, active_table(model), "gaussian")

    def evaluate() -> None:
        with torch.no_grad(), placement.session():
            placement.move_to(NoiseTerms.single(1, 0, [0.1]))
            model(torch.arange(3))

    with pytest.raises(UnreachedParameterError, match=r"layer\.weight.*learn"):
        evaluate()
    placement.learn(functional=["layer.weight", "embed.weight"])
    evaluate()
    with pytest.raises(ValueError, match="no parameters named"):
        placement.learn(functional=["nothing"])


def test_excused_parameters_may_be_left_out() -> None:
    model = Experts()
    placement = ScratchPlacement(model, active_table(model), "gaussian")
    placement.learn(unread=["experts.1.weight", "experts.1.bias"])
    with torch.no_grad(), placement.session():
        placement.move_to(NoiseTerms.single(1, 0, [0.1]))
        model(torch.ones(2, 4), 0)


def test_held_weights_that_are_tied_by_their_storage() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False)
            self.b = nn.Linear(4, 4, bias=False)
            self.b.weight.data = self.a.weight.data

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.a.weight @ self.b.weight

    model = Pair()
    x = torch.randn(3, 4)
    optimizer = ZerothOrderSGD(model, lr=0.0, eps=0.1)
    seen: list[float] = []
    optimizer.step(lambda: seen.append(float(model(x).sum())) or seen[-1])
    assert optimizer.last_step is not None
    zk.add_noise_(optimizer.placement.table, optimizer.last_step.seed, 0.1)
    with torch.no_grad():
        assert float(model(x).sum()) == seen[-2]


class TiedInside(nn.Module):
    """A bias that a module and a layer in it both own, as in BERT's masked head."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(5))
        self.decoder = nn.Linear(4, 5)
        self.decoder.bias = self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x) + self.bias


def test_tied_owners_that_are_nested() -> None:
    model = TiedInside()
    before = snapshot(model)
    x = torch.randn(3, 4)
    optimizer = ZerothOrderSGD(model, lr=0.0, eps=0.1)
    seen: list[float] = []
    for _ in range(2):
        optimizer.step(lambda: seen.append(float(model(x).square().sum())) or seen[-1])
    assert same_bits(model, before)
    assert optimizer.last_step is not None
    zk.add_noise_(optimizer.placement.table, optimizer.last_step.seed, 0.1)
    with torch.no_grad():
        assert float(model(x).square().sum()) == seen[-2]


def test_a_tied_weight_with_an_owner_that_never_runs() -> None:
    """As the shared embedding of encoder and decoder."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Embedding(7, 4)
            self.embed = nn.Embedding(7, 4)
            self.embed.weight = self.shared.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.embed(ids)

    model = Shared()
    optimizer = ZerothOrderSGD(model, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: model(torch.arange(7)).square().sum())
    assert optimizer.last_step is not None
    assert optimizer.last_step.scalars[0] != 0.0


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_hooks_that_compute_with_the_weights() -> None:
    """weight_norm makes the weight in a pre-hook, from parameters perturbed by then."""
    scalars = []
    for placement in ("scratch", "inplace"):
        torch.manual_seed(4)
        model = nn.utils.weight_norm(nn.Linear(4, 3))
        x = torch.randn(5, 4)
        optimizer = ZerothOrderSGD(model, lr=0.0, eps=0.1, placement=placement)
        optimizer.step(lambda model=model, x=x: model(x).square().mean())
        assert optimizer.last_step is not None
        scalars.append(optimizer.last_step.scalars[0])
    assert scalars[0] == pytest.approx(scalars[1], rel=bound("other placement"))


def test_a_module_that_returns_its_weight() -> None:
    """A view of the scratch buffer, which the next module will write."""

    class Latents(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))

        def forward(self, n: int) -> dict[str, tuple[Tensor, ...]]:
            return {"rows": (self.weight[:n],)}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latents = Latents()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.latents(3)["rows"][0]
            return (self.layer(x) @ torch.ones(6, 4) + rows).square().mean()

    scalars = []
    for placement in ("scratch", "inplace"):
        torch.manual_seed(4)
        model, x = Model(), torch.randn(3, 4)
        optimizer = ZerothOrderSGD(model, lr=0.0, eps=0.1, placement=placement)
        optimizer.step(lambda model=model, x=x: model(x))
        assert optimizer.last_step is not None
        scalars.append(optimizer.last_step.scalars[0])
    assert scalars[0] == pytest.approx(scalars[1], rel=bound("other placement"))


@pytest.mark.parametrize("placement", ["scratch", "inplace"])
def test_autocast_around_a_step(placement: str) -> None:
    """It keeps casts of weights by their tensors, which would hide perturbations."""
    torch.manual_seed(4)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), torch.randn(5, 8)
    optimizer = ZerothOrderSGD(model, lr=0.0, eps=0.1, placement=placement)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step(lambda: model(x).float().square().mean())
    outside = ZerothOrderSGD(model, lr=0.0, eps=0.1, placement=placement)

    def closure() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float().square().mean()

    outside.step(closure)
    assert optimizer.last_step is not None
    assert outside.last_step is not None
    assert optimizer.last_step.scalars[0] != 0.0
    assert optimizer.last_step.scalars[0] == pytest.approx(
        outside.last_step.scalars[0], rel=bound("autocast")
    )
