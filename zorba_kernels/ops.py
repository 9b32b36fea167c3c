"""The operations, and their form as torch operators, ``torch.ops.zorba_kernels``.

They run at once, or, while ``torch.compile`` looks, become operators of a graph. A graph holds
tensors, strings and numbers, not a ``ParamTable``: its parts are arguments of the operator, which
finds the table of its tensors again when the graph runs. Integers travel in int64 tensors with the
bits of the uint64, so that a new seed compiles nothing anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor

from zorba_kernels import dispatch
from zorba_kernels.entry import columns_of
from zorba_kernels.noise import DISTRIBUTIONS, MAX_ELEMENTS, Distribution, as_int64
from zorba_kernels.program import Program, check_choice, check_sample, check_uint64, integer
from zorba_kernels.table import ParamTable, find_table

P = ParamSpec("P")
InPlace = Callable[Concatenate[ParamTable, P], None]
OutOfPlace = Callable[Concatenate[ParamTable, ParamTable, P], None]


def _operations(make: Callable[P, Program]) -> tuple[InPlace[P], OutOfPlace[P]]:
    """Returns ``add_noise_`` and ``add_noise``, which take the arguments of ``Program``."""

    def add_noise_(table: ParamTable, *args: P.args, **kwargs: P.kwargs) -> None:
        """Adds a linear combination of seeded noises to every tensor of the table, in place.

        ``w <- round(w - decay * w + sum_k coefs[group, k] * z(seeds[k], stream, samples[k], .))``,
        each weight read once and written once: ``table.run(Program(seeds, coefs, ...))``.

        Args:
            table: the tensors; modified in place.
            *args: of ``Program``: ``seeds``, ``coefs``, ``distribution="gaussian"``,
                ``rounding="nearest"``, ``rounding_seed=None``.
            **kwargs: of ``Program``: the same, ``samples``, ``rounds``, ``decay``, ``backend``.

        Raises:
            TypeError, ValueError: bad arguments; nothing was changed.
            BackendUnavailableError: the backend asked for cannot serve.
            RuntimeError: a tensor of the table was moved or resized.
        """
        if torch.compiler.is_compiling():
            # Nothing is checked while tracing: values are only known when the graph runs.
            given = _in_graph(args, kwargs)
            torch.ops.zorba_kernels.add_noise_(_tensors(table), *_layout(table), **given)
        else:
            table.run(make(*args, **kwargs))

    def add_noise(table: ParamTable, out: ParamTable, *args: P.args, **kwargs: P.kwargs) -> None:
        """The same as ``add_noise_``, written to the tensors of ``out``; ``table`` is only read.

        Args:
            table: the tensors read.
            out: a table of the same names, shapes, dtypes, groups and offsets; its tensors are
                overwritten.
            *args: see ``add_noise_``.
            **kwargs: see ``add_noise_``.

        Raises:
            ValueError: the tables differ, besides what ``add_noise_`` raises.
        """
        if torch.compiler.is_compiling():
            given = _in_graph(args, kwargs)
            tensors = _tensors(table), _tensors(out)
            torch.ops.zorba_kernels.add_noise(*tensors, *_layout(table), **given)
        else:
            table.run(make(*args, **kwargs), out)

    # For help() and editors: the arguments are listed once, by Program.
    arguments = list(inspect.signature(make).parameters.values())
    for operation, own in ((add_noise_, 1), (add_noise, 2)):
        plain = inspect.signature(operation)
        named = [*plain.parameters.values()][:own] + arguments
        setattr(operation, "__signature__", plain.replace(parameters=named))  # noqa: B010
    return add_noise_, add_noise  # type: ignore[return-value]  # tables may be given by name too


add_noise_, add_noise = _operations(Program)


def fingerprint(table: ParamTable, *, backend: str | None = None) -> int:
    """Returns a 64-bit hash of the exact bits of all tensors.

    It depends on the names, dtype-sized bits and positions of the elements, not on the order of
    the tensors, the device or the backend. Two replicas that agree compare 8 bytes. It finds
    accidents; it is no defence against an adversary.
    """
    if torch.compiler.is_compiling():
        # A graph ends where its result is read.
        bits = torch.ops.zorba_kernels.fingerprint(_tensors(table), *_layout(table), backend)
        return int(bits.item()) % (1 << 64)
    return _fingerprint(table, backend)


def noise(
    shape: int | Sequence[int],
    *,
    seed: int,
    stream: int,
    sample: int = 0,
    distribution: Distribution = "gaussian",
    device: str | torch.device = "cpu",
    offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Returns the values themselves: ``z(seed, stream, sample, offset + i)``, float32 of ``shape``.

    Args:
        shape: of the result; elements are indexed in row-major order.
        seed: uint64.
        stream: uint64, for a parameter ``zorba_kernels.noise.stream_of(name)``.
        sample: below 2**31.
        distribution: "gaussian", "rademacher", or "rank1": an outer product of signs, of the rows
            (the first dimension) and of the columns (all others).
        device: where the result lives.
        offset: index of the first element, of which ``shape`` tells the row length.
        backend: name of a backend, or None for the best that can serve.

    Raises:
        ValueError: an argument out of range.
    """
    size = (shape,) if isinstance(shape, int) else tuple(shape)
    where = torch.device(device)
    rest = (sample, distribution, where, offset, backend)
    if torch.compiler.is_compiling():
        z: Tensor = torch.ops.zorba_kernels.noise(size, _words(seed), _words(stream), *rest)
        return z
    return _noise(torch.Size(size), seed, stream, *rest)


# The operators run these, not the functions above: a tracer may compute with constants, and while
# it does the functions would make another operator of the call, and so on.


def _fingerprint(table: ParamTable, backend: str | None) -> int:
    # A hash of memory that was freed would pass for one of the weights.
    table.check()
    chosen = dispatch.choose(backend, table.device)
    return int(chosen.fingerprint(table.made_contiguous()))


def _noise(
    size: torch.Size, seed: int, stream: int, sample: int, distribution: Distribution,
    device: torch.device, offset: int, backend: str | None,
) -> Tensor:  # fmt: skip
    check_choice("distribution", distribution, DISTRIBUTIONS)
    offset = integer(offset, "offset")
    if any(n < 0 for n in size):
        raise ValueError(f"shape must not be negative, got {tuple(size)}")
    count = size.numel()
    if offset < 0 or offset + count > MAX_ELEMENTS:
        raise ValueError(f"elements {offset} to {offset + count} are outside of [0, 2**35)")
    words = check_uint64(seed, "seed"), check_uint64(stream, "stream"), check_sample(sample)
    key = dispatch.NoiseKey(*words, distribution, columns_of(size))
    return dispatch.choose(backend, device).noise(count, offset, key, device).reshape(size)


# --- Arguments of an operator --------------------------------------------------------------------

_LAYOUT = "str[] names, int[] groups, int[] offsets, int[] columns, int num_groups"
_KINDS = {
    name: str(parameter.annotation).removesuffix(" | None")
    for name, parameter in inspect.signature(Program).parameters.items()
}
"""The arguments of ``Program``, each of ``Words``, ``Reals`` or ``str``."""


def _schema() -> str:
    """The arguments of ``Program`` in the language of operators: lists of numbers are tensors."""
    types = {"Words": "Tensor", "Reals": "Tensor", "str": "str"}
    parts: list[str] = []
    for name, parameter in inspect.signature(Program).parameters.items():
        # By keyword only where Program has it so: a call reads alike inside and outside of a graph.
        if parameter.kind == parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        # Defaults are Program's own, so that an operator leaves out what a caller leaves out.
        default = ""
        if parameter.default is not parameter.empty:
            text = parameter.default
            default = "=None" if text is None else f'="{text}"'
        optional = "?" if str(parameter.annotation).endswith("None") else ""
        parts.append(f"{types[_KINDS[name]]}{optional} {name}{default}")
    return ", ".join(parts)


def _in_graph(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``Program`` as an operator takes them, by name."""
    # Plain loops: Dynamo traces through here, and cannot through inspect.Signature.bind.
    given = dict(zip(_KINDS, args, strict=False)) | kwargs
    for name, value in given.items():
        kind = _KINDS.get(name)
        if kind == "Words":
            given[name] = _words(value)
        elif kind == "Reals" and value is not None and not isinstance(value, Tensor):
            given[name] = torch.tensor(value, dtype=torch.float64)
    return given


def _words(values: int | Sequence[int] | Tensor | None) -> Tensor | None:
    """uint64 values as int64 [n] with the same bits."""
    if values is None:
        return None
    if isinstance(values, Tensor):
        return values.reshape(-1).to(torch.int64)
    # One by one: a symbolic integer stays a variable of the graph.
    listed = [values] if isinstance(values, int) else list(values)
    return torch.tensor([as_int64(v) for v in listed], dtype=torch.int64)


def _unsigned(word: Tensor) -> int:
    return int(word.item()) % (1 << 64)


def _layout(table: ParamTable) -> tuple[list[str], list[int], list[int], list[int], int]:
    groups, offsets = [e.group for e in table.entries], [e.offset for e in table.entries]
    return table.names, groups, offsets, [e.columns for e in table.entries], table.num_groups


def _tensors(table: ParamTable) -> list[Tensor]:
    """As they were given: a tracer must see that they are the parameters of a model."""
    return [e.source for e in table.entries]


# --- The operators: what runs, and what a tracer needs to know ------------------------------------

_LAYOUT_ARGUMENTS = 5


def _run_in_place(tensors: list[Tensor], *rest: Any, **kwargs: Any) -> None:
    layout, program = rest[:_LAYOUT_ARGUMENTS], rest[_LAYOUT_ARGUMENTS:]
    find_table(tensors, *layout).run(Program(*program, **kwargs))


def _run_out_of_place(tensors: list[Tensor], out: list[Tensor], *rest: Any, **kwargs: Any) -> None:
    layout, program = rest[:_LAYOUT_ARGUMENTS], rest[_LAYOUT_ARGUMENTS:]
    # Tables first, then the program: a bad argument is refused with nothing changed.
    target = find_table(out, *layout)
    find_table(tensors, *layout).run(Program(*program, **kwargs), target)


def _run_fingerprint(tensors: list[Tensor], *rest: Any) -> Tensor:
    *layout, backend = rest
    return torch.tensor(as_int64(_fingerprint(find_table(tensors, *layout), backend)))


def _run_noise(shape: Sequence[int], seed: Tensor, stream: Tensor, *rest: Any) -> Tensor:
    return _noise(torch.Size(shape), _unsigned(seed), _unsigned(stream), *rest)


# Implemented for every device at once: the backend is chosen by table.run, not by torch.
_library: Any = torch.library.Library("zorba_kernels", "DEF")  # type: ignore[no-untyped-call]  # the operators live as long as it


def _define(declaration: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = declaration.split("(")[0]
    _library.define(declaration)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"zorba_kernels::{name}", fake, lib=_library)


_define(
    f"add_noise_(Tensor(a!)[] tensors, {_LAYOUT}, {_schema()}) -> ()",
    _run_in_place,
    lambda *arguments, **kwargs: None,
)
_define(
    f"add_noise(Tensor[] tensors, Tensor(a!)[] out, {_LAYOUT}, {_schema()}) -> ()",
    _run_out_of_place,
    lambda *arguments, **kwargs: None,
)
_define(
    f"fingerprint(Tensor[] tensors, {_LAYOUT}, str? backend) -> Tensor",
    _run_fingerprint,
    lambda *arguments: torch.empty((), dtype=torch.int64),
)
_define(
    "noise(SymInt[] shape, Tensor seed, Tensor stream, SymInt sample, str distribution, "
    "Device device, SymInt offset, str? backend) -> Tensor",
    _run_noise,
    lambda shape, seed, stream, sample, distribution, device, *rest: torch.empty(
        shape, dtype=torch.float32, device=device
    ),
)
