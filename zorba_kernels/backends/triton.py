"""The Triton backend: for GPUs without the compiled part, NVIDIA's and AMD's.

One launch for all tensors of a dtype of a table, on torch's current stream. Triton compiles a
kernel at its first use, and ``triton_tuning`` measures how to run it on large tables.

With ``TRITON_INTERPRET=1`` set before the first use it serves CPU tensors instead, slowly, and only
when it is named: that is how the tests prove its bits on machines without a GPU.
"""

from __future__ import annotations

import importlib
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from zorba_kernels.backends import reference, triton_tuning
from zorba_kernels.backends.device_table import DeviceTable, HeldProgram, OncePerPair
from zorba_kernels.backends.triton_tuning import TILE, Config
from zorba_kernels.noise import Distribution
from zorba_kernels.program import Program, make_program
from zorba_kernels.table import DTYPE_CODES, ParamTable

EXACT = {"enable_fp_fusion": False}
"""Options of every launch: a contracted multiply would change the results."""

LANES = 256
"""Lanes of 8 bytes that a program of the fingerprint hashes at a time."""

NOISE_BLOCKS = 256
"""Blocks of 8 values that a program of the noise makes."""

_PROGRAMS = 32  # that a launch starts for each processor, at most
_OLDEST = (8, 0)  # compute capability of the first NVIDIA GPUs with bfloat16 conversions


def unavailable(device: torch.device) -> str | None:
    """Returns why this backend cannot serve tensors on the device, or None."""
    if device.type not in ("cuda", "cpu"):
        return f"it serves GPU tensors, not {device.type}"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") == "0":
        return (
            "it serves GPU tensors, not cpu (the interpreter of Triton, TRITON_INTERPRET=1, does)"
        )
    try:
        interpreted = _interpreted()
    except ImportError as error:
        return f"triton cannot be imported ({error}); install it: pip install triton"
    if interpreted != (device.type == "cpu"):
        return (
            "the interpreter of Triton is on (TRITON_INTERPRET), which serves CPU tensors"
            if interpreted
            else "TRITON_INTERPRET was set after the kernels were loaded; set it before"
        )
    return _interpreter_fault() if interpreted else _gpu_fault(device)


def add_noise(table: ParamTable, out: ParamTable, program: Program) -> None:
    """``out <- round(table + sum of noises)``, see ``zorba_kernels.add_noise_``."""
    held = None
    if len(program.seeds) == 1 and len(program.round_ends) == 1:
        # The kernel of one term leaves out groups whose coefficient is zero: right where no decay
        # and no other place to write to is left.
        left_out = program.coefs == 0
        if not bool((left_out & ((program.decays != 0) | (table is not out))).any()):
            if len(program.coefs) > 1:
                held = HeldProgram(program, table.device)
            _run(table, out, _single(program, held), _flags(program, many=False))
            return
    DeviceProgram(program, table.device).run(table, out)


def noise(
    numel: int,
    offset: int,
    seed: int,
    stream: int,
    sample: int,
    distribution: Distribution,
    device: torch.device,
) -> Tensor:
    """Returns z at indices ``offset .. offset + numel``: float32 [numel]."""
    z = torch.empty(numel, dtype=torch.float32, device=device)
    elements = 8 * NOISE_BLOCKS
    programs = -(-(offset + numel) // elements) - offset // elements
    if numel:
        with _guard(device):
            kernel("noise")[(programs,)](
                z,
                numel,
                offset,
                *_halves(seed),
                *_halves(stream),
                sample,
                GAUSSIAN=distribution == "gaussian",
                BLOCKS=NOISE_BLOCKS,
                **EXACT,
            )
    return z


def fingerprint(table: ParamTable) -> int:
    """Returns the 64-bit fingerprint of the table's tensors; waits for it."""
    device = table.device
    result = torch.zeros(1, dtype=torch.int64, device=device)
    packed = table.packed(table)
    held = _whole.get(table, table, lambda: _device_table(packed, device))
    if device.type == "cuda":
        held.for_stream(torch.cuda.current_stream(device))
    if len(packed):
        with _guard(device):
            kernel("fingerprint")[(_programs(max(held.tiles, 1), device),)](
                held.segments,
                held.ends,
                len(packed),
                held.tiles,
                result,
                TILE=TILE,
                LANES=LANES,
                **EXACT,
            )
    return int(result.item()) % (1 << 64)


class DeviceProgram(HeldProgram):
    """A program whose seeds and coefficients live in device memory.

    ``run`` neither allocates nor waits, so it can be captured into a CUDA graph once it has run
    with the same tables, which compiles the kernel and, for large tables, measures how to run it; a
    replay then reads what the tensors hold at that time. The tensors may be written, not resized.
    """

    def run(self, table: ParamTable, out: ParamTable) -> None:
        """``out <- round(table + sum of noises)``, on the current stream of the table's device."""
        _run(table, out, _many(self), _flags(self, many=True))


# --- Launches ------------------------------------------------------------------------------------


def _flags(program: Program | HeldProgram, many: bool) -> dict[str, Any]:
    """Compile-time flags of ``add_noise``, but the dtype."""
    return {
        "GAUSSIAN": program.distribution == "gaussian",
        "STOCHASTIC": program.rounding == "stochastic",
        "MANY": many,
        "DECAYS": many or bool((program.decays != 0).any()),
        "TILE": TILE,
    }


def _single(program: Program, held: HeldProgram | None) -> dict[str, Any]:
    """Arguments of ``add_noise`` for one round of one term; held: each group has its own."""
    seed_lo, seed_hi = _halves(program.seeds[0])
    rounding_lo, rounding_hi = _halves(program.rounding_seeds[0])
    return {
        "seed_lo": seed_lo,
        "seed_hi": seed_hi,
        "sample": program.samples[0],
        "rounding_lo": rounding_lo,
        "rounding_hi": rounding_hi,
        "coef": 1.0 if held else program.coefs.item(),
        "decay": 0.0 if held else program.decays.item(),
        "grouped": int(held is not None),
        "seeds": None,
        "samples": None,
        "coefs": held.coefs if held else None,
        "decays": held.decays if held else None,
        "round_ends": None,
        "rounding_seeds": None,
        "terms": 1,
        "rounds": 1,
    }


def _many(held: HeldProgram) -> dict[str, Any]:
    """Arguments of ``add_noise`` for any program."""
    unused = ("seed_lo", "seed_hi", "sample", "rounding_lo", "rounding_hi", "grouped")
    return {
        **dict.fromkeys(unused, 0),
        "coef": 1.0,
        "decay": 0.0,
        "seeds": held.seeds,
        "samples": held.samples,
        "coefs": held.coefs,
        "decays": held.decays,
        "round_ends": held.round_ends,
        "rounding_seeds": held.rounding_seeds,
        "terms": len(held.seeds),
        "rounds": len(held.round_ends),
    }


def _run(
    table: ParamTable, out: ParamTable, arguments: dict[str, Any], flags: dict[str, Any]
) -> None:
    device = table.device
    function = kernel("add_noise")
    for code, held in _by_dtype.get(table, out, lambda: _device_tables(table.packed(out), device)):
        ours = flags | {"DTYPE": code}
        if code == DTYPE_CODES[torch.float32]:
            ours["STOCHASTIC"] = False
        _launch(function, held, arguments, ours | _config(ours, held, device).options())


def _config(flags: dict[str, Any], held: DeviceTable, device: torch.device) -> Config:
    if _interpreted():
        return Config(TILE, 1)  # the larger, the faster it is there
    with _guard(device):
        return triton_tuning.choose(
            kernel("add_noise"), flags, held.tiles * TILE, device, _rehearse
        )


def _launch(
    function: Any, held: DeviceTable, arguments: dict[str, Any], options: dict[str, Any]
) -> None:
    device = held.segments.device
    if device.type == "cuda":
        held.for_stream(torch.cuda.current_stream(device))
    unused = held.segments  # any pointer
    given = {name: unused if value is None else value for name, value in arguments.items()}
    with _guard(device):
        function[(_programs(held.tiles, device),)](
            segments=held.segments,
            ends=held.ends,
            count=len(held.segments),
            tiles=held.tiles,
            **given,
            **options,
            **EXACT,
        )


def _rehearse(function: Any, flags: dict[str, Any], elements: int, device: torch.device) -> None:
    """Runs the kernel, for measurements, on memory of its own."""
    dtype = next(d for d, code in DTYPE_CODES.items() if code == flags["DTYPE"])
    table = ParamTable({"scratch": torch.zeros(elements, dtype=dtype, device=device)})
    terms = 8 if flags["MANY"] else 1
    program = make_program(
        list(range(terms)),
        [1e-3] * terms,
        1,
        "gaussian" if flags["GAUSSIAN"] else "rademacher",
        "stochastic" if flags["STOCHASTIC"] else "nearest",
        None,
        None,
        None,
        1e-3 if flags["DECAYS"] else None,
    )
    many = flags["MANY"]
    arguments = _many(HeldProgram(program, device)) if many else _single(program, None)
    _launch(function, _device_table(table.packed(table), device), arguments, flags)


# --- Tables --------------------------------------------------------------------------------------

_whole: OncePerPair[DeviceTable] = OncePerPair()
_by_dtype: OncePerPair[list[tuple[int, DeviceTable]]] = OncePerPair()


def _device_tables(packed: Tensor, device: torch.device) -> list[tuple[int, DeviceTable]]:
    """A device table for each dtype code that occurs in a segment with elements."""
    filled = packed[packed[:, 2] > 0]
    codes = sorted(set(filled[:, 5].tolist()))
    return [(code, _device_table(filled[filled[:, 5] == code], device)) for code in codes]


def _device_table(packed: Tensor, device: torch.device) -> DeviceTable:
    numel, offset = packed[:, 2], packed[:, 3]
    tiles = (offset + numel + TILE - 1) // TILE - offset // TILE
    ends = torch.where(numel > 0, tiles, 0).cumsum(0)
    return DeviceTable.copy(packed, ends, int(ends[-1]) if len(ends) else 0, device)


# --- Where it runs -------------------------------------------------------------------------------


def kernel(name: str) -> Any:
    """Returns a kernel by the name of its op, which is also that of its module."""
    return getattr(_module(name), name)


@cache
def _module(name: str) -> Any:
    return importlib.import_module(f"zorba_kernels.kernels.{name}")


@cache
def _interpreted() -> bool:
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(kernel("add_noise"), InterpretedFunction)


@cache
def _interpreter_fault() -> str | None:
    """Triton's interpreter rounds a fused multiply-add twice, and cuts conversions to bfloat16."""
    cpu = torch.device("cpu")
    weights, expected = (
        module(512, 0, 1, 2, 0, "gaussian", cpu) for module in (noise, reference.noise)
    )
    tables = [ParamTable({"w": weights.bfloat16()}) for _ in range(2)]
    program = make_program([1], 0.1, 1, "rademacher", "nearest", None, None, None)
    for module, table in zip((add_noise, reference.add_noise), tables, strict=True):
        module(table, table, program)
    same = torch.equal(weights, expected)
    if same and torch.equal(*(table.entries[0].tensor for table in tables)):
        return None
    return (
        "the interpreter of Triton does not round as the noise contract has it; the tests correct "
        "that (tests/kernels/interpreter.py)"
    )


def _gpu_fault(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no usable GPU"
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        return f"there is no GPU {index}, only {torch.cuda.device_count()}"
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < _OLDEST:
        return f"it needs an NVIDIA GPU of compute capability {_OLDEST[0]}.{_OLDEST[1]} or newer"
    return None


def _guard(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _programs(tiles: int, device: torch.device) -> int:
    """A launch that fills the device a few times over; each program takes several tiles."""
    return min(tiles, _PROGRAMS * _processors(device))


@cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _halves(number: int) -> tuple[int, int]:
    """Low and high 32 bits."""
    return number & 0xFFFFFFFF, number >> 32
