"""The operations as torch operators, ``torch.ops.zorba_kernels``, with schemas and fake kernels.

A function under ``torch.compile`` that calls ``zorba_kernels.add_noise_`` or a companion holds one
of these in its graph (``traced.py`` makes the call). When the graph runs, the operator finds the
``ParamTable`` of its tensors and calls the plain function, which checks the arguments and chooses
the backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zorba_kernels import eager
from zorba_kernels.noise import as_int64
from zorba_kernels.table import find_table

_LAYOUT = "str[] names, int[] groups, int[] offsets, int num_groups"
_PROGRAM = (
    "Tensor seeds, Tensor coefs, str distribution, str rounding, Tensor? rounding_seed, "
    "Tensor? samples, int[]? rounds, Tensor? decay, str? backend"
)

_library: Any = torch.library.Library("zorba_kernels", "DEF")  # type: ignore[no-untyped-call]  # the operators live as long as it
_library.define(f"add_noise_(Tensor(a!)[] tensors, {_LAYOUT}, {_PROGRAM}) -> ()")
_library.define(f"add_noise(Tensor[] tensors, Tensor(a!)[] out, {_LAYOUT}, {_PROGRAM}) -> ()")
_library.define(f"fingerprint(Tensor[] tensors, {_LAYOUT}, str? backend) -> Tensor")
_library.define(
    "noise(SymInt[] shape, Tensor seed, Tensor stream, SymInt sample, str distribution, "
    "Device device, SymInt offset, str? backend) -> Tensor"
)

# --- Implementations ------------------------------------------------------------------------------


def _unsigned(words: Tensor) -> list[int]:
    return [v % (1 << 64) for v in words.tolist()]


def _program(
    seeds: Tensor,
    coefs: Tensor,
    distribution: str,
    rounding: str,
    rounding_seed: Tensor | None,
    samples: Tensor | None,
    rounds: Sequence[int] | None,
    decay: Tensor | None,
    backend: str | None,
) -> dict[str, Any]:
    return {
        "seeds": _unsigned(seeds),
        "coefs": coefs,
        "distribution": distribution,
        "rounding": rounding,
        "rounding_seed": None if rounding_seed is None else _unsigned(rounding_seed),
        "samples": None if samples is None else samples.tolist(),
        "rounds": rounds,
        "decay": decay,
        "backend": backend,
    }


def _add_noise_(
    tensors: list[Tensor],
    names: list[str],
    groups: list[int],
    offsets: list[int],
    num_groups: int,
    *program: Any,
) -> None:
    table = find_table(tensors, names, groups, offsets, num_groups)
    eager.add_noise(table, table, **_program(*program))


def _add_noise(
    tensors: list[Tensor],
    out: list[Tensor],
    names: list[str],
    groups: list[int],
    offsets: list[int],
    num_groups: int,
    *program: Any,
) -> None:
    eager.add_noise(
        find_table(tensors, names, groups, offsets, num_groups),
        find_table(out, names, groups, offsets, num_groups),
        **_program(*program),
    )


def _fingerprint(
    tensors: list[Tensor],
    names: list[str],
    groups: list[int],
    offsets: list[int],
    num_groups: int,
    backend: str | None,
) -> Tensor:
    table = find_table(tensors, names, groups, offsets, num_groups)
    return torch.tensor(as_int64(eager.fingerprint(table, backend)))


def _noise(
    shape: Sequence[int],
    seed: Tensor,
    stream: Tensor,
    sample: int,
    distribution: str,
    device: torch.device,
    offset: int,
    backend: str | None,
) -> Tensor:
    key, number = _unsigned(seed)[0], _unsigned(stream)[0]
    return eager.noise(shape, key, number, sample, distribution, device, offset, backend)


# --- What a tracer needs to know ------------------------------------------------------------------


def _fake_add_noise(*arguments: Any) -> None:
    return None


def _fake_fingerprint(*arguments: Any) -> Tensor:
    return torch.empty((), dtype=torch.int64)


def _fake_noise(
    shape: Sequence[int],
    seed: Tensor,
    stream: Tensor,
    sample: int,
    distribution: str,
    device: torch.device,
    offset: int,
    backend: str | None,
) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)


for _name, _implementation, _fake in (
    ("add_noise_", _add_noise_, _fake_add_noise),
    ("add_noise", _add_noise, _fake_add_noise),
    ("fingerprint", _fingerprint, _fake_fingerprint),
    ("noise", _noise, _fake_noise),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"zorba_kernels::{_name}", _fake, lib=_library)
