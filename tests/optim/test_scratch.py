"""The scratch placement: what it shows, however a model uses its parameters, and what it costs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zorba import ZerothOrderSGD
from zorba.optim import NoiseTerms, ScratchPlacement, active_table
from zorba.optim.owners import Probe, find_owners

import zorba_kernels as zk
from tests.optim.models import Adapter, Tied, failing, same_bits, scratch_bytes, snapshot, untouched
from tests.tolerances import bound

IDS = torch.tensor([1, 5, 1, 7])


class Functional(nn.Module):
    """A head that multiplies with the embedding's weight, and a layer that is used directly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layer = nn.Linear(8, 8, bias=False)
        self.plain = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(nn.functional.linear(self.embed(ids), self.layer.weight))
        return self.plain(hidden) @ self.embed.weight.T


class TiedInside(nn.Module):
    """A bias that a module and a layer in it both own, as in BERT's masked head."""

    def __init__(self, by_storage: bool = False) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(5))
        self.decoder = nn.Linear(8, 5)
        if by_storage:
            self.decoder.bias.data = self.bias.data
        else:
            self.decoder.bias = self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x) + self.bias


class Latents(nn.Module):
    """Returns a view of its weight: of the buffer, which the next module writes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, n: int) -> dict[str, tuple[Tensor, ...]]:
        return {"rows": (self.weight[:n],)}


class ReadsLatents(nn.Module):
    """Uses the view behind another module's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = Latents()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.latents(3)["rows"][0]
        return self.layer(x) + rows


class Pair(nn.Module):
    """Two weights tied by their storage alone, in modules or used without these."""

    def __init__(self, direct: bool) -> None:
        super().__init__()
        self.direct = direct
        self.a = nn.Linear(8, 8, bias=False)
        self.b = nn.Linear(8, 8, bias=False)
        self.b.weight.data = self.a.weight.data

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a.weight @ self.b.weight if self.direct else self.b(torch.tanh(self.a(x)))


class Shared(nn.Module):
    """A tied weight with an owner that never runs: the embedding of encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(11, 4)
        self.embed = nn.Embedding(11, 4)
        self.embed.weight = self.shared.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids)


MODELS: dict[str, Any] = {
    "tied by identity": (Tied, IDS),
    "used without modules": (Functional, IDS),
    "nested": (Adapter, None),
    "tied and nested": (TiedInside, None),
    "tied by storage and nested": (lambda: TiedInside(by_storage=True), None),
    "tied by storage": (lambda: Pair(direct=False), None),
    "tied by storage, without modules": (lambda: Pair(direct=True), None),
    "an owner that never runs": (Shared, IDS),
    "a module that returns its weight": (ReadsLatents, None),
    # It makes the weight in a pre-hook, from parameters that must be perturbed by then.
    "weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(8, 3)), None),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("dtype", "estimator"),
    [(torch.float32, "central"), (torch.bfloat16, "forward"), (torch.float16, "central")],
)
@pytest.mark.parametrize("case", MODELS)
def test_losses_and_update_are_those_by_hand(
    case: str, dtype: torch.dtype, estimator: str, generator: torch.Generator
) -> None:
    make, x = MODELS[case]
    model = make().to(dtype)
    x = torch.randn(3, 8, generator=generator).to(dtype) if x is None else x
    eps, lr = 0.05, 1e-3
    optimizer = ZerothOrderSGD(model, lr=lr, eps=eps, estimator=estimator, rounding="nearest")
    seen: list[float] = []

    def loss() -> float:
        with torch.no_grad():
            return float(model(x).float().square().mean())

    for _ in range(2):
        start = snapshot(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step(lambda: seen.append(loss()) or seen[-1])
        report, after = optimizer.last_step, snapshot(model)
        assert untouched(model) or case == "weight_norm"
        assert report.scalars[0] != 0.0
        expected = []
        for scale in (eps, -eps) if estimator == "central" else (0.0, eps):
            model.load_state_dict(start, strict=False)
            zk.add_noise_(active_table(model), report.seed, scale)
            expected.append(loss())
        assert seen[-2:] == expected
        model.load_state_dict(start, strict=False)
        zk.add_noise_(active_table(model), report.seed, -lr * report.scalars[0])
        assert same_bits(model, after)


def test_a_probe_tells_uses_apart() -> None:
    model = Functional()
    model.unused = nn.Linear(3, 3)
    table = active_table(model)
    probe = Probe(find_owners(model, table), table, lambda: None)
    with torch.no_grad(), probe.watch():
        model(torch.arange(5))
    assert probe.functional == {"embed.weight", "layer.weight"}
    assert probe.unread == {"unused.weight", "unused.bias"}
    assert untouched(model)


def test_experts_that_no_input_reaches() -> None:
    """A warning that names them; other inputs may reach them later."""
    experts, x = nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), torch.randn(3, 4)
    optimizer = ZerothOrderSGD(experts, lr=0.01)
    with pytest.warns(UserWarning, match=r"1\.weight") as caught:
        optimizer.step(lambda: experts[0](x).square().mean())
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: experts[1](x).square().mean())
    assert optimizer.last_step.scalars[0] != 0.0, "the second expert was perturbed"


@pytest.mark.parametrize("coefs", [[0.0, 0.1], [0.1, 0.0], [0.1, 0.2]])
def test_a_placement_of_its_own_is_told_what_to_hold(coefs: list[float]) -> None:
    """A group whose coefficient is 0 is not perturbed."""
    model = Functional()
    groups = {name: int(name.startswith("embed")) for name, _ in model.named_parameters()}
    placement = ScratchPlacement(model, active_table(model, groups), "rademacher")
    placement.hold(["layer.weight", "embed.weight"])
    with torch.no_grad():
        with placement.session():
            placement.move_to(NoiseTerms.single(3, 1, coefs))
            seen = model(IDS)
        columns = [[c] for c in coefs]
        zk.add_noise_(placement.table, 3, columns, "rademacher", samples=1)
        assert torch.equal(model(IDS), seen)
    with pytest.raises(ValueError, match="no module of the model: nothing"):
        placement.hold(["nothing"])


def test_names_that_collide_without_prefixes_are_refused() -> None:
    model = nn.Linear(3, 3)
    model.module = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="two parameters are called 'weight'"):
        active_table(model)


@pytest.mark.parametrize(
    ("make", "nbytes"),
    [
        # The largest module's parameters, 64 bytes apart.
        (Tied, 37 * 16 * 4),
        # The scale, 8 floats; the layer inside of its module, 64 and 8.
        (Adapter, 64 + 256 + 64),
        # Those that are held, the embedding of 352 bytes and the layer; and the plain module.
        (Functional, 384 + 256 + 256 + 64),
    ],
)
def test_scratch_is_the_largest_module_of_each_level(
    make: type[nn.Module], nbytes: int, generator: torch.Generator
) -> None:
    model = make()
    x = torch.randn(3, 8, generator=generator) if make is Adapter else IDS
    optimizer = ZerothOrderSGD(model, lr=0.1)
    for _ in range(3):
        optimizer.step(lambda: model(x).square().mean())
    assert scratch_bytes(optimizer) == nbytes


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_weights_are_exact_and_in_their_place(at: int, error: type[BaseException] | None) -> None:
    """A closure may fail in the first evaluation, which is watched, or the one that repeats it."""
    model = Functional().to(torch.bfloat16)
    before = snapshot(model)
    addresses = [p.data_ptr() for p in model.parameters()]
    optimizer = ZerothOrderSGD(model, lr=0.0, eps=0.1)

    def loss() -> Tensor:
        return model(IDS).float().square().mean()

    if error is not None:
        closure = failing(loss, at, error)
        with pytest.raises(error, match="injected"):  # noqa: PT012
            optimizer.step(closure)
            optimizer.step(closure)
    for _ in range(at):
        optimizer.step(loss)
    assert same_bits(model, before)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert untouched(model)


@pytest.mark.parametrize("placement", ["scratch", "inplace"])
def test_autocast_around_a_step(placement: str) -> None:
    """It keeps casts of weights by their tensors, which would hide perturbations."""
    torch.manual_seed(4)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), torch.randn(5, 8)

    def loss() -> Tensor:
        return model(x).float().square().mean()

    def within() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss()

    around = ZerothOrderSGD(model, lr=0.0, eps=0.1, placement=placement)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        around.step(loss)
    inside = ZerothOrderSGD(model, lr=0.0, eps=0.1, placement=placement)
    inside.step(within)
    (scalar,) = around.last_step.scalars
    assert scalar != 0.0
    assert scalar == pytest.approx(inside.last_step.scalars[0], rel=bound("autocast"))
