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
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from zorba_kernels.backends import reference, triton_tuning
from zorba_kernels.backends.device_table import DeviceTable, OncePerPair
from zorba_kernels.backends.triton_tuning import TILE, Config
from zorba_kernels.dispatch import Backend, NoiseKey, RowNoise
from zorba_kernels.noise import DISTRIBUTION_CODES
from zorba_kernels.program import PackedProgram, Program
from zorba_kernels.table import DTYPE_CODES, ParamTable

EXACT = {"enable_fp_fusion": False}
"""Options of every launch: a contracted multiply would change the results."""

LANES = 256
"""Lanes of 8 bytes that a program of the fingerprint hashes at a time."""

PERTURBED_PIECE = 512
"""Elements of a layer's input or output that a program takes at a time."""

PERTURBED = EXACT | {"num_warps": 1}
"""Options of that launch: a call makes the signs of 128 elements, of which a thread then has 16."""

NOISE_BLOCKS = 256
"""Blocks of 8 values that a program of the noise makes."""

_PROGRAMS = 32  # that a launch starts for each processor, at most
_OLDEST = (8, 0)  # compute capability of the first NVIDIA GPUs with bfloat16 conversions


def unavailable(device: torch.device) -> str | None:
    """Returns why this backend cannot serve tensors on the device, or None."""
    if device.type not in ("cuda", "cpu"):
        return f"it serves GPU tensors, not {device.type}"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") == "0":
        return "it serves GPU tensors, not cpu (Triton's interpreter does: TRITON_INTERPRET=1)"
    try:
        interpreted = _interpreted()
    except ImportError as error:
        return f"triton cannot be imported ({error}); install it: pip install triton"
    # Triton decides when a kernel is decorated: the environment may say something else by now.
    if interpreted != (device.type == "cpu"):
        return (
            "the interpreter of Triton is on (TRITON_INTERPRET), which serves CPU tensors"
            if interpreted
            else "TRITON_INTERPRET was set after the kernels were loaded; set it before"
        )
    return _interpreter_fault() if interpreted else _gpu_fault(device)


def run(table: ParamTable, out: ParamTable, program: Program) -> None:
    """See ``dispatch.Backend``."""
    # Copied once for each stream: a launch on another one would have to wait for the copy.
    key = ("triton", table.device, _stream(table.device), table.num_groups, out is table)
    program.once(key, lambda: _launch_of(program, table, out is table)).run(table, out)


def noise(numel: int, offset: int, key: NoiseKey, device: torch.device) -> Tensor:
    """See ``dispatch.Backend``."""
    z = torch.empty(numel, dtype=torch.float32, device=device)
    # Programs are aligned in the whole parameter: the first may begin before the offset.
    elements = 8 * NOISE_BLOCKS
    programs = -(-(offset + numel) // elements) - offset // elements
    words = (key.columns, *_halves(key.seed), *_halves(key.stream), key.sample)
    flags = {"DISTRIBUTION": DISTRIBUTION_CODES[key.distribution], "BLOCKS": NOISE_BLOCKS}
    if numel:
        with _guard(device):
            kernel("noise")[(programs,)](z, numel, offset, *words, **flags, **EXACT)
    return z


def fingerprint(table: ParamTable) -> int:
    """See ``dispatch.Backend``; waits for the result."""
    device = table.device
    result = torch.zeros(1, dtype=torch.int64, device=device)
    # One table for all dtypes: the kernel hashes bytes, and headers carry the dtype.
    packed = table.packed(table)
    held = _whole.get(table, table, lambda: _device_table(packed, device))
    if device.type == "cuda":
        held.for_stream(torch.cuda.current_stream(device))
    given = (held.segments, held.ends, len(packed), held.tiles, result)
    if len(packed):
        with _guard(device):
            grid = (_programs(max(held.tiles, 1), device),)
            kernel("fingerprint")[grid](*given, TILE=TILE, LANES=LANES, **EXACT)
    return int(result.item()) % (1 << 64)


@dataclass(frozen=True)
class _Launch:
    """A launch of ``add_noise`` but for the table: its arguments, and its compile-time flags."""

    arguments: dict[str, Any]
    flags: dict[str, Any]

    def run(self, table: ParamTable, out: ParamTable) -> None:
        device = table.device
        function = kernel("add_noise")
        tables = _by_dtype.get(table, out, lambda: _device_tables(table.packed(out), device))
        for code, held in tables:
            flags = self.flags | {"DTYPE": code}
            # float32 always rounds to nearest: one kernel less to compile.
            if code == DTYPE_CODES[torch.float32]:
                flags["STOCHASTIC"] = False
            options = flags | _config(flags, held, device).options()
            _start(function, held, self.arguments, options)


class DeviceProgram(PackedProgram):
    """A program whose seeds and coefficients live in device memory, for tables of one size.

    ``run`` neither allocates nor waits, so it can be captured into a CUDA graph once it has run
    with the same tables, which compiles the kernel and, for large tables, measures how to run it; a
    replay then reads the values of ``arrays`` at that time. The arrays may be written, not resized.
    """

    def __init__(self, program: Program, table: ParamTable) -> None:
        """Copies the program to the table's device, for tables of its number of groups."""
        super().__init__(program, table.num_groups, table.device)
        counts = {"terms": self.terms, "rounds": self.rounds}
        self._launch = _Launch(_SINGLE | self.arrays | counts, _flags(program, many=True))

    def run(self, table: ParamTable, out: ParamTable) -> None:
        """``out <- round(table + sum of noises)``, on the current stream of the table's device."""
        self._launch.run(table, out)


# --- Launches ------------------------------------------------------------------------------------

_SINGLE: dict[str, Any] = {
    **dict.fromkeys(("seed_lo", "seed_hi", "sample", "rounding_lo", "rounding_hi", "grouped"), 0),
    **{"coef": 1.0, "decay": 0.0, "terms": 1, "rounds": 1},
}
"""Arguments of ``add_noise`` for one round of one term, where they are not given."""


def _flags(program: Program, many: bool, decays: bool = True) -> dict[str, Any]:
    """Compile-time flags of ``add_noise``, but the dtype."""
    return {
        "DISTRIBUTION": DISTRIBUTION_CODES[program.distribution],
        "STOCHASTIC": program.rounding == "stochastic",
        "MANY": many,
        "DECAYS": decays,
        "TILE": TILE,
    }


def _launch_of(program: Program, table: ParamTable, in_place: bool) -> _Launch | DeviceProgram:
    """The launch of a program on tables like this one: one term travels as arguments."""
    coefs, decays = program.coefs(table.num_groups), program.decays(table.num_groups)
    if coefs.shape[1] != 1 or decays.shape[1] != 1:
        return DeviceProgram(program, table)
    # The kernel of one term leaves out groups whose coefficient is zero: right where no decay and
    # no other place to write to is left.
    left = (coefs == 0) & (decays != 0) if in_place else coefs == 0
    if bool(left.any()):
        return DeviceProgram(program, table)
    # Values, not tensors: nothing is copied, and no value is compiled in.
    arguments: dict[str, Any] = _SINGLE | {"sample": program.samples[0]}
    arguments["seed_lo"], arguments["seed_hi"] = _halves(program.seeds[0])
    arguments["rounding_lo"], arguments["rounding_hi"] = _halves(program.rounding_seeds[0])
    if table.num_groups == 1:
        arguments |= {"coef": coefs.item(), "decay": decays.item()}
    else:
        packed = PackedProgram(program, table.num_groups, table.device)
        arguments |= {name: packed.arrays[name] for name in ("coefs", "decays")} | {"grouped": 1}
    return _Launch(arguments, _flags(program, many=False, decays=bool((decays != 0).any())))


def _config(flags: dict[str, Any], held: DeviceTable, device: torch.device) -> Config:
    if _interpreted():
        return Config(TILE, 1)  # the larger, the faster it is there
    elements = held.tiles * TILE
    with _guard(device):
        return triton_tuning.choose(kernel("add_noise"), flags, elements, device, _rehearse)


def _start(function: Any, held: DeviceTable, arguments: dict[str, Any], options: Any) -> None:
    device = held.segments.device
    if device.type == "cuda":
        held.for_stream(torch.cuda.current_stream(device))
    # Arrays that this launch does not read still need a pointer of the right kind: any will do.
    given = dict.fromkeys(PackedProgram.ARRAYS, held.segments) | arguments
    rows = (held.segments, held.ends, len(held.segments), held.tiles)
    with _guard(device):
        function[(_programs(held.tiles, device),)](*rows, **given, **options, **EXACT)


def _rehearse(function: Any, flags: dict[str, Any], elements: int, device: torch.device) -> None:
    """Runs the kernel, for measurements, on memory of its own."""
    dtype = next(d for d, code in DTYPE_CODES.items() if code == flags["DTYPE"])
    table = ParamTable({"scratch": torch.zeros(elements, dtype=dtype, device=device)})
    # Enough terms that the loop over them, not the load and the store, decides what is fastest.
    terms = 8 if flags["MANY"] else 1
    program = Program(list(range(terms)), [1e-3] * terms, decay=1e-3 if flags["DECAYS"] else None)
    launch = _launch_of(program, table, in_place=True)
    arguments = (launch._launch if isinstance(launch, DeviceProgram) else launch).arguments
    _start(function, _device_table(table.packed(table), device), arguments, flags)


# --- Tables --------------------------------------------------------------------------------------

_whole: OncePerPair[DeviceTable] = OncePerPair()
_by_dtype: OncePerPair[list[tuple[int, DeviceTable]]] = OncePerPair()


def _device_tables(packed: Tensor, device: torch.device) -> list[tuple[int, DeviceTable]]:
    """A device table for each dtype code that occurs in a segment with elements."""
    # A launch for each dtype, which these kernels know at compile time.
    filled = packed[packed[:, 2] > 0]
    codes = sorted(set(filled[:, 5].tolist()))
    return [(code, _device_table(filled[filled[:, 5] == code], device)) for code in codes]


def _device_table(packed: Tensor, device: torch.device) -> DeviceTable:
    # Tiles are aligned in the whole parameter, as blocks of noise are: a shard may touch one more.
    numel, offset = packed[:, 2], packed[:, 3]
    tiles = (offset + numel + TILE - 1) // TILE - offset // TILE
    ends = torch.where(numel > 0, tiles, 0).cumsum(0)
    return DeviceTable.copy(packed, ends, int(ends[-1]) if len(ends) else 0, device)


# --- Where it runs -------------------------------------------------------------------------------


@cache
def kernel(name: str) -> Any:
    """Returns a kernel by the name of its op, which is also that of its module."""
    return getattr(importlib.import_module(f"zorba_kernels.kernels.{name}"), name)


@cache
def _interpreted() -> bool:
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(kernel("add_noise"), InterpretedFunction)


@cache
def _interpreter_fault() -> str | None:
    """Triton's interpreter rounds a fused multiply-add twice, and cuts conversions to bfloat16."""
    # Asked of the kernels themselves: versions of Triton differ, and tests may have corrected it.
    cpu = torch.device("cpu")
    key = NoiseKey(1, 2, 0, "gaussian")
    weights, expected = (make(512, 0, key, cpu) for make in (noise, reference.noise))
    tables = [ParamTable({"w": weights.bfloat16()}) for _ in range(2)]
    program = Program(1, 0.1, "rademacher")
    for serve, table in zip((run, reference.run), tables, strict=True):
        serve(table, table, program)
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
    # An index that is not there would only fail at the launch, as an error of the device.
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        return f"there is no GPU {index}, only {torch.cuda.device_count()}"
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < _OLDEST:
        return f"it needs an NVIDIA GPU of compute capability {_OLDEST[0]}.{_OLDEST[1]} or newer"
    return None


def _guard(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _programs(tiles: int, device: torch.device) -> int:
    """A launch that fills the device a few times over; each program takes several tiles."""
    return min(tiles, _most_programs(device))


@cache
def _most_programs(device: torch.device) -> int:
    if device.type == "cpu":
        return _PROGRAMS
    return _PROGRAMS * int(torch.cuda.get_device_properties(device).multi_processor_count)


def _halves(number: int) -> tuple[int, int]:
    """Low and high 32 bits."""
    return number & 0xFFFFFFFF, number >> 32


def perturb(x: Tensor | None, y: Tensor, noise: RowNoise) -> None:
    """See ``dispatch.Backend``."""
    rows, tokens, outputs = y.shape
    inputs = 0 if x is None else x.shape[2]
    # Addresses: the kernel reads bits, not values of the dtype.
    places = (0 if x is None else x.data_ptr(), y.data_ptr(), noise.samples, noise.scale)
    words = (*_halves(noise.seed), *_halves(noise.stream))
    flags = {"HAS_X": x is not None, "TRANSPOSED": noise.transposed, "PIECE": PERTURBED_PIECE}
    with _guard(y.device):
        kernel("perturbed_linear")[(rows * tokens,)](
            *places,
            tokens,
            inputs,
            outputs,
            *words,
            DTYPE=DTYPE_CODES[y.dtype],
            **flags,
            **PERTURBED,
        )


BACKEND = Backend("triton", ("cuda",), unavailable, run, noise, fingerprint, perturb)
