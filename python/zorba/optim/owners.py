"""Which modules hold active parameters: the places where perturbed weights must appear."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

import zorba_kernels as zk


@dataclass(frozen=True, eq=False)
class Owner:
    """A module that holds active parameters itself.

    Attributes:
        module: whose forward reads them.
        parameters: by canonical name.
        level: how many owners the module is nested in.
    """

    module: nn.Module
    parameters: dict[str, nn.Parameter]
    level: int


def find_owners(model: nn.Module, table: zk.ParamTable) -> list[Owner]:
    """Returns every module that holds an active parameter itself; a tied one has several owners.

    Args:
        model: the model.
        table: its active parameters.

    Raises:
        ValueError: a parameter of the table is in no module, or twice in one.
    """
    # Parameters are told apart by their storage, not their identity: two of them may be views of
    # the same weights (``b.weight.data = a.weight.data``), and both must show the noise.
    wanted = {key_of(entry.source): entry.name for entry in table.entries}
    owners: list[Owner] = []
    paths: set[str] = set()
    for path, module in model.named_modules():
        mine: dict[str, nn.Parameter] = {}
        for p in module._parameters.values():
            name = wanted.get(key_of(p)) if p is not None else None
            if p is None or name is None:
                continue
            if name in mine:
                raise ValueError(
                    f"module {path!r} holds the weights of {name!r} under two names: keep one"
                )
            mine[name] = p
        if mine:
            parts = path.split(".") if path else []
            above = {".".join(parts[:i]) for i in range(len(parts))}
            owners.append(Owner(module, mine, len(above & paths)))
            paths.add(path)
    found = {name for owner in owners for name in owner.parameters}
    lost = [entry.name for entry in table.entries if entry.name not in found]
    if lost:
        raise ValueError(
            f"these parameters belong to no module of the model: {', '.join(lost[:5])}"
        )
    return owners


def key_of(p: Tensor) -> object:
    """Returns a key that is the same for parameters with the same weights: where these are."""
    # An empty tensor has no address, and nothing in it could be tied.
    return (p.data_ptr(), p.dtype, p.shape, p.stride()) if p.numel() else id(p)
