"""The noise contract in plain torch: the oracle. Slow, and runs on any device torch has.

Unsigned 32-bit words live in int64 tensors. Nothing here depends on a torch generator, and every
float operation is one IEEE-754 operation, so the bits do not depend on the device either.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from zorba_kernels.dispatch import Backend, NoiseKey, RowNoise
from zorba_kernels.noise import (
    BLOCK_ELEMENTS,
    COLUMN_DOMAIN,
    ROUNDING_DOMAIN,
    ROW_DOMAIN,
    as_int64,
)
from zorba_kernels.program import Program
from zorba_kernels.table import DTYPE_CODES, Entry, ParamTable

CHUNK = 1 << 20  # elements worked on at a time: bounds the memory of the int64 intermediates
_MASK32 = 0xFFFFFFFF


def unavailable(device: torch.device) -> str | None:
    """Returns why this backend cannot serve tensors on the device, or None."""
    return "meta tensors hold no values" if device.type == "meta" else None


def run(table: ParamTable, out: ParamTable, program: Program) -> None:
    """See ``dispatch.Backend``."""
    coefs, decays = program.coefs(table.num_groups), program.decays(table.num_groups)
    for source, target in zip(table.entries, out.entries, strict=True):
        flat = source.tensor.reshape(-1)
        # The source may be the target: it is only overwritten when all of it has been read.
        result = torch.empty_like(flat)
        for start in range(0, flat.numel(), CHUNK):
            piece = flat[start : start + CHUNK]
            rows = coefs[source.group], decays[source.group]
            with _gradual_underflow():
                changed = _add_chunk(source, piece, start, program, *rows)
            result[start : start + CHUNK] = changed
        target.tensor.copy_(result.reshape(source.tensor.shape))


def noise(numel: int, offset: int, key: NoiseKey, device: torch.device) -> Tensor:
    """See ``dispatch.Backend``."""
    z = torch.empty(numel, dtype=torch.float32, device=device)
    # In pieces: the int64 intermediates take many times the memory of the values.
    for start in range(0, numel, CHUNK):
        count = min(CHUNK, numel - start)
        index = torch.arange(offset + start, offset + start + count, device=device)
        z[start : start + count] = _noise_at(index, key)
    return z


def fingerprint(table: ParamTable) -> int:
    """See ``dispatch.Backend``: the sum of the hashes of all headers and 8-byte lanes."""
    total = 0
    for entry in table.entries:
        flat = entry.tensor.reshape(-1)
        # The header tells dtypes and lengths apart whose bytes are the same.
        header = flat.numel() << 2 | DTYPE_CODES[flat.dtype]
        total += int(_mix64(torch.tensor(header ^ as_int64(entry.stream))))
        per_lane = 8 // flat.element_size()
        for start in range(0, flat.numel(), CHUNK):
            piece = flat[start : start + CHUNK]
            padded = piece.new_zeros(-(-piece.numel() // per_lane) * per_lane)
            padded[: piece.numel()] = piece
            # Little-endian bytes: the hash is of memory, not of values.
            lanes = padded.view(torch.int64)
            lane = start // per_lane + torch.arange(lanes.numel(), device=piece.device)
            key = as_int64(entry.stream) + as_int64(0x9E3779B97F4A7C15) * (lane + 1)
            total += int(_mix64(lanes ^ key).sum())
    return total % (1 << 64)


def perturb(x: Tensor | None, y: Tensor, noise: RowNoise) -> None:
    """See ``dispatch.Backend``."""
    for r, (sample, scale) in enumerate(zip(noise.samples.tolist(), noise.scale, strict=True)):
        key = NoiseKey(noise.seed, noise.stream, sample, "rank1")
        domains = (ROW_DOMAIN, COLUMN_DOMAIN)[:: -1 if noise.transposed else 1]
        u = signs_of(torch.arange(y.shape[2], device=y.device), domains[0], key)
        size = scale.to(y.device)
        if float(size) == 0.0:
            continue
        if x is not None:
            v = signs_of(torch.arange(x.shape[2], device=x.device), domains[1], key)
            size = size * (x[r].float() @ v)[:, None]
        y[r] = (y[r].float() + size * u).to(y.dtype)


BACKEND = Backend("reference", None, unavailable, run, noise, fingerprint, perturb)

# --- Noise ---------------------------------------------------------------------------------------


def _philox(block: Tensor, stream: int, sample: int, seed: int) -> list[Tensor]:
    """Philox4x32-10 at counters (block, stream low, stream high, sample): four words a block."""
    c0 = block
    c1 = torch.full_like(block, stream & _MASK32)
    c2 = torch.full_like(block, stream >> 32)
    c3 = torch.full_like(block, sample)
    k0, k1 = seed & _MASK32, seed >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # the wrap to int64 keeps all 64 bits
        c0, c1 = ((p1 >> 32) & _MASK32) ^ c1 ^ k0, p1 & _MASK32
        c2, c3 = ((p0 >> 32) & _MASK32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return [c0, c1, c2, c3]


def _words_at(
    index: Tensor, elements: int, stream: int, sample: int, seed: int
) -> tuple[Tensor, int]:
    """Words of all the blocks that a range of indices touches: int64 [blocks, 4], first block."""
    if index.numel() == 0:
        return index.new_empty(0, 4), 0
    first, last = (int(index[at]) // elements for at in (0, -1))
    block = torch.arange(first, last + 1, device=index.device)
    return torch.stack(_philox(block, stream, sample, seed), dim=1), first


def _noise_at(index: Tensor, key: NoiseKey) -> Tensor:
    if key.distribution == "rank1":
        if key.columns == 0:
            return signs_of(index, ROW_DOMAIN, key)
        rows = signs_of(index // key.columns, ROW_DOMAIN, key)
        return rows * signs_of(index % key.columns, COLUMN_DOMAIN, key)
    # Whole blocks are made, and the range cut out: it may begin and end inside of one.
    elements = BLOCK_ELEMENTS[key.distribution]
    words, first = _words_at(index, elements, key.stream, key.sample, key.seed)
    local = index - first * elements
    if key.distribution == "gaussian":
        return torch.stack(_box_muller(words), dim=2).reshape(-1)[local]
    # A bit an element, from the least significant on.
    bits = (words.reshape(-1)[local // 32] >> (local % 32)) & 1
    return (1 - 2 * bits).to(torch.float32)


def signs_of(which: Tensor, domain: int, key: NoiseKey) -> Tensor:
    """Signs of some rows or columns of a parameter, float32: 1 or -1."""
    calls, where = torch.unique(which // 128, return_inverse=True)
    words = torch.stack(_philox(calls + domain, key.stream, key.sample, key.seed), dim=1)
    word = words[where].gather(1, (which % 128 // 32)[:, None])[:, 0]
    return (1 - 2 * ((word >> (which % 32)) & 1)).to(torch.float32)


def _box_muller(word: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals a word; see ``csrc/noise.h`` for what each line computes."""
    hexf = float.fromhex
    # Radius: the low 16 bits are the mantissa of a float near 2^23, so that u is exact.
    u = _as_float((word & 0xFFFF) | 0x4B000000) - 8388607.5
    u_bits = _as_bits(u)
    m = _as_float((u_bits & 0x7FFFFF) | 0x3F800000)
    g = _fma(m, hexf("0x1.43e25cp-4"), hexf("-0x1.42d802p-1"))
    g = _fma(m, g, hexf("0x1.0b7faap+1"))
    g = _fma(m, g, hexf("-0x1.8553ecp+1"))
    line = _fma(u_bits.to(torch.int32).to(torch.float32), -(2.0**-23), 144.5031745)
    s = _fma(m, g, line)

    # 1 / sqrt(s): an integer guess, and one polynomial correction in place of Newton steps.
    y = _as_float(0x5F3759DF - (_as_bits(s) >> 1))
    t = s * y
    v = t * y
    p = _fma(v, _fma(v, hexf("0x1.808ae0p-2"), hexf("-0x1.408d50p+0")), hexf("0x1.e06a9cp+0"))
    r = _as_float(_as_bits(t * p) ^ (word & 0x80000000))

    # Angle: bits 16 to 30, half an angle step off zero, so that no sign is favoured.
    x = _as_float(((word >> 15) & 0xFFFE) | 0x4A800000) - 4210687.5
    xx = x * x
    c = _fma(xx, hexf("-0x1.705eaep-90"), hexf("0x1.308724p-58"))
    c = _fma(xx, c, hexf("-0x1.73cb0cp-28"))
    c = _fma(xx, c, hexf("0x1.2d6a3ap+0"))
    d = _fma(xx, hexf("0x1.5a8fa8p-74"), hexf("-0x1.83166cp-43"))
    d = _fma(xx, d, hexf("0x1.d95234p-14"))
    return r * c, r * (x * d)


# --- The primitive -------------------------------------------------------------------------------


def _add_chunk(
    entry: Entry, piece: Tensor, first: int, program: Program, coefs: Tensor, decays: Tensor
) -> Tensor:
    """The chunk after all rounds, as stored; ``first`` is its place in the tensor."""
    stochastic = program.rounding == "stochastic" and piece.dtype != torch.float32
    index = entry.offset + first + torch.arange(piece.numel(), device=piece.device)
    stored = piece
    start = 0
    rounds = zip(program.round_ends, program.rounding_seeds, decays, strict=True)
    for end, rounding_seed, decay in rounds:
        terms = [k for k in range(start, end) if float(coefs[k]) != 0.0]
        start = end
        if not terms and float(decay) == 0.0:
            continue  # not even rounded: the bits of a NaN stay
        weights = stored.to(torch.float32)
        decay = decay.to(weights.device)
        # The dither comes first, so that the sum has one order on every backend.
        total = torch.zeros_like(weights)
        if stochastic:
            random16, dither = _rounding_at(index, entry.stream, rounding_seed)
            scale = _as_bits(weights) & 0x7F000000
            if piece.dtype == torch.float16:
                scale = scale.clamp(min=0x38000000)
            total = _as_float(scale) * dither
        # An infinite weight times a decay of 0 would be NaN.
        if float(decay) != 0.0:
            total = _fma(weights, -decay, total)
        for k in terms:
            which = (program.seeds[k], entry.stream, program.samples[k], program.distribution)
            z = _noise_at(index, NoiseKey(*which, entry.columns))
            total = _fma(coefs[k].to(z.device), z, total)
        # One addition after the sum: small terms add up before they meet a large weight.
        value = weights + total
        stored = _stochastic(value, random16, piece.dtype) if stochastic else value.to(piece.dtype)
    return stored


def _rounding_at(index: Tensor, stream: int, seed: int) -> tuple[Tensor, Tensor]:
    """16 random bits of each element (int64) and the dither of its block (float32)."""
    block = index // 8
    calls = ((block >> 6) << 5) | (block & 31)
    # Two blocks share a call: each is made once.
    unique, where = torch.unique(calls, return_inverse=True)
    words = torch.stack(_philox(unique, stream, ROUNDING_DOMAIN, seed), dim=1)[where]
    half = ((block >> 5) & 1) * 2
    first = words.gather(1, half[:, None])[:, 0]
    second = words.gather(1, half[:, None] + 1)[:, 0]
    element = index % 8
    word = torch.where(element < 4, first, second)
    own = 8 * (element & 3)
    following = 8 * ((element + 1) & 3)
    random16 = (((word >> own) & 0xFF) << 8) | ((word >> following) & 0xFF)
    mixed = _to_int32((first + second) & _MASK32)
    return random16, mixed.to(torch.float32) * 2.0**-54


def _stochastic(value: Tensor, random16: Tensor, dtype: torch.dtype) -> Tensor:
    # Random bits below the last one that is kept, then a cut: up with the probability of the rest.
    bits = _as_bits(value)
    size = bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded = _as_float((bits + random16) & 0xFFFF0000)
    else:
        # Below 2^-14 halves are evenly spaced: adding 2^-14 puts their step at bit 13, as above.
        lift = torch.where(size < 0x38800000, 2.0**-14, 0.0).to(torch.float32)
        cut = (_as_bits(_as_float(size) + lift) + (random16 >> 3)) & 0xFFFFE000
        out = _as_float(cut) - lift
        rounded = torch.where(out >= 65536.0, torch.inf, out)
        rounded = torch.where(bits >= 0x80000000, -rounded, rounded)
    rounded = torch.where(size > 0x7F800000, torch.nan, rounded)
    return rounded.to(dtype)  # exact


@contextmanager
def _gradual_underflow() -> Iterator[None]:
    """Gradual underflow is part of the contract; the caller may have switched it off."""
    # Asked of Python's own floats: torch cannot say which mode it is in.
    flushed = sys.float_info.min * 0.5 == 0.0
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed)


# --- Bits ----------------------------------------------------------------------------------------


def _to_int32(word: Tensor) -> Tensor:
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)


def _as_float(word: Tensor) -> Tensor:
    return _to_int32(word).view(torch.float32)


def _as_bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.int32).to(torch.int64) & _MASK32


def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """Correctly rounded float32 ``a * b + c``: exact product and round-to-odd sum in float64."""
    a, b, c = (torch.as_tensor(v, dtype=torch.float32, device=_device(a, b, c)) for v in (a, b, c))
    # The product of two float32 is exact in float64. The sum is made odd where it is not exact, so
    # that the way back to float32 is the only rounding (Boldo and Melquiond, 2008).
    product = a.double() * b.double()
    addend = c.double()
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    away = torch.where((error > 0) == (total > 0), 1, -1)
    bits = total.view(torch.int64)
    nudge = ((error > 0) | (error < 0)) & ((bits & 1) == 0)
    return torch.where(nudge, bits + away, bits).view(torch.float64).float()


def _device(*values: Tensor | float) -> torch.device:
    tensors = [v for v in values if isinstance(v, Tensor)]
    return max(tensors, key=lambda t: t.ndim).device


def _mix64(x: Tensor) -> Tensor:
    """Finaliser of MurmurHash3 on int64 lanes, logical shifts."""
    # torch shifts the sign in; the mask takes it out again.
    x = x ^ ((x >> 33) & 0x7FFFFFFF)
    x = x * as_int64(0xFF51AFD7ED558CCD)
    x = x ^ ((x >> 33) & 0x7FFFFFFF)
    x = x * as_int64(0xC4CEB9FE1A85EC53)
    return x ^ ((x >> 33) & 0x7FFFFFFF)
