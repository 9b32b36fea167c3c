"""The code of the CUDA kernels, compiled for the host, equals the oracle bit for bit.

``csrc/cuda/warp.h`` is what a warp runs. Here 32 lanes run it one after the other, so what this
proves is the arithmetic, the addressing and the sharing of work; not the machine code of a GPU.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import zorba_kernels as zk
from tests.kernels.bits import DTYPES, assert_same_bits
from zorba_kernels.backends import reference
from zorba_kernels.dispatch import NoiseKey, RowNoise
from zorba_kernels.table import DTYPE_CODES

SOURCE = Path(__file__).parent / "cuda_on_host.cpp"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("cuda") / "cuda_on_host.so"
    flags = "-std=c++17 -O1 -fPIC -shared -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas"
    command = [str(COMPILER), *flags.split(), str(SOURCE), "-o", str(path)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture
def check(library):
    """Compares passes in place and out of place, in every way the program can be launched."""

    def run(table, out, program, single):
        segments, packed = table.packed(out), program.packed(table.num_groups)
        library.add_noise(
            ctypes.c_void_p(segments.data_ptr()), ctypes.c_int64(len(segments)),
            ctypes.c_void_p(packed.address), ctypes.c_bool(single),
        )  # fmt: skip

    def compare(weights, program, singles=(False,), **places):
        table = zk.ParamTable(weights, **places)
        expected = {n: torch.empty_like(w) for n, w in weights.items()}
        reference.run(table, zk.ParamTable(expected, **places), program)
        for single in singles:
            results = {n: torch.full_like(w, torch.nan) for n, w in weights.items()}
            run(table, zk.ParamTable(results, **places), program, single)
            assert_same_bits(results, expected)
            # In place, between elements that must keep their bits.
            sevens = {n: torch.full((8,), 7.0, dtype=w.dtype) for n, w in weights.items()}
            padded = {n: torch.cat([sevens[n], w.flatten(), sevens[n]]) for n, w in weights.items()}
            inner = {n: p[8:-8].view(weights[n].shape) for n, p in padded.items()}
            mine = zk.ParamTable(inner, **places)
            run(mine, mine, program, single)
            around = {
                n: torch.cat([sevens[n], w.flatten(), sevens[n]]) for n, w in expected.items()
            }
            assert_same_bits(padded, around)

    return compare


@pytest.mark.covering(size=[0, 1, 7, 511, 512, 1023, 1024, 4095, 4096, 4097, 9001])
def test_one_term(check, rng, dtype, rounding, distribution, size):
    call = (rng.integer(64), rng.coefs(1), distribution, rounding, rng.integer(64))
    program = zk.Program(*call, samples=rng.integer(31))
    weights = {"w": rng.weights(size, dtype)}
    for offset in (0, 3, 8, 512, 4100, (1 << 33) - 520):
        check(weights, program, offsets={"w": offset}, singles=(True, False))
    # The first element is 3 elements behind a 64-byte boundary.
    check({"w": rng.weights(size + 3, dtype)[3:]}, program, singles=(True, False))


@pytest.mark.covering(terms=[1, 2, 8, 19])
def test_many_terms_and_rounds(check, rng, terms, rounding, distribution):
    coefs = rng.coefs(3, terms)
    coefs[0, terms // 2 :] = 0
    coefs[1, 0] = 0
    program = zk.Program(
        rng.integers(terms), coefs, distribution, rounding, rng.integers(3),
        samples=rng.integers(terms, bits=31), rounds=[terms // 3, 0, terms - terms // 3],
        decay=[[0.0, 0.0, 0.0], [0.01, 0.0, 0.02], [0.0, 0.5, 0.0]],
    )  # fmt: skip
    weights = {
        "a": rng.weights(5000, torch.bfloat16),
        "b": rng.weights(0, torch.float32),
        "c": rng.weights(4612, torch.float16),
        "d": rng.weights(2051, torch.bfloat16)[1:],
        "e": rng.weights(4096, torch.float32),
        "f": rng.weights(1, torch.float16),
        "g": rng.weights(9000, torch.bfloat16),
    }
    groups = {"a": 1, "c": 2, "e": 1, "f": 2, "g": 2}
    check(weights, program, groups=groups, offsets={"e": 5, "g": 24})


ROUNDS = {
    "one round": [64],
    "a term each": [1] * 40,
    "uneven": [0, 31, 2, 30, 1, 0],
    "long": [3, 0, 90, 4],
}


@pytest.mark.covering(rounds=ROUNDS, distribution=["rademacher", "rank1"])
def test_many_terms_with_signs(check, rng, rounds, dtype, rounding, distribution):
    """More terms than a warp makes signs for together, in rounds that begin and end anywhere."""
    cut = ROUNDS[rounds]
    terms = sum(cut)
    coefs = rng.coefs(5, terms)
    coefs[0, 5:terms:7] = 0.0
    coefs[0, 6:terms:7] = -0.0
    coefs[1, 20:60] = 0.0
    coefs[2, torch.arange(terms) != terms - 1] = 0.0  # one term, the last
    decay = torch.zeros(5, len(cut))
    decay[3, -1] = 0.25
    program = zk.Program(
        rng.integers(terms), coefs, distribution, rounding, rng.integers(len(cut)),
        samples=rng.integers(terms, bits=31), rounds=cut, decay=decay,
    )  # fmt: skip
    sizes = {"a": 1024, "b": 1536 + 513, "c": 2048, "d": 1999, "e": 640}
    weights = {n: rng.weights(size, dtype) for n, size in sizes.items()}
    weights["a"][::3] = -0.0
    weights["c"][::2] = 0.0
    weights["c"][100] = torch.inf
    groups = {name: group for group, name in enumerate(sizes)}
    check(weights, program, groups=groups, offsets={"b": 512, "d": 8 * 77, "e": 384})


SHAPES = (
    *((1,), (63,), (4097,), (1, 1), (5, 7), (63, 65), (128, 128), (300, 257), (1000, 1)),
    *((1, 1000), (3, 5, 7), (700, 576), (4100, 2), (5, 1001), (9, 1024), (3, 4093), (2, 9001)),
)


@pytest.mark.covering(shape=SHAPES, offset=[0, 3, 2045, 4608, 5_000_000_000])
def test_rank1_shapes(check, rng, dtype, rounding, shape, offset):
    """Rows that end anywhere in a tile, a strip or a word of signs."""
    weights = {"w": rng.weights(shape, dtype)}
    call = (rng.integer(64), rng.coefs(1), "rank1", rounding, rng.integer(64))
    one = zk.Program(*call, samples=rng.integer(31))
    check(weights, one, offsets={"w": offset}, singles=(True, False))
    # More than a warp makes signs for together.
    call = (rng.integers(37), rng.coefs(37), "rank1", rounding, rng.integers(3))
    many = zk.Program(*call, samples=rng.integers(37, bits=31), rounds=[3, 0, 34])
    check(weights, many, offsets={"w": offset})


def test_rank1_calls_of_a_run(library):
    """What a warp has room for is what its lanes make: 4 calls more than full ones."""
    every = [*range(1, 300), *range(500, 530), *range(1000, 1300), 4095, 4096, 4097, 10**6, 10**10]
    for columns in every:
        for start in range(0, 512 * 60, 512):
            assert library.calls_of_strips(start // 512, ctypes.c_int64(columns)) <= 12
            assert library.calls_of_tile(start // 4096 * 8, ctypes.c_int64(columns)) <= 36


@pytest.mark.parametrize("shape", SHAPES)
def test_rank1_values(library, rng, shape):
    columns = torch.Size(shape[1:]).numel() if len(shape) > 1 else 0
    key = NoiseKey(rng.integer(64), rng.integer(64), rng.integer(31), "rank1", columns)
    for offset in (0, 5, 5_000_000_000):
        count = min(torch.Size(shape).numel(), 5000)
        z = torch.full((count,), torch.nan)
        library.noise(
            ctypes.c_void_p(z.data_ptr()), ctypes.c_int64(count), ctypes.c_int64(offset),
            ctypes.c_uint64(key.seed), ctypes.c_uint64(key.stream), ctypes.c_uint32(key.sample),
            ctypes.c_int64(columns),
        )  # fmt: skip
        assert torch.equal(z, reference.noise(count, offset, key, z.device))


class Perturbation(ctypes.Structure):
    """As in csrc/packed.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "samples", "scale")),
        *((name, ctypes.c_int64) for name in ("rows", "tokens", "inputs", "outputs", "dtype")),
        *((name, ctypes.c_uint64) for name in ("seed", "stream")),
        ("transposed", ctypes.c_int64),
    )


TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.covering(inputs=[None, 1, 8, 130, 1000, 4096, 17_000], outputs=[1, 8, 1001, 16_640])
@pytest.mark.parametrize("transposed", [False, True])
def test_perturb(library, rng, dtype, inputs, outputs, transposed):
    """Rows with the same sample, with others, and with none; tokens that begin anywhere."""
    rows, tokens = 5, 3
    y = rng.weights((rows, tokens, outputs), dtype)
    x = None if inputs is None else rng.weights((rows, tokens, inputs), dtype)
    samples = torch.tensor([7, 7, *rng.integers(3, bits=31)])
    scale = torch.tensor([0.5, -0.5, 0.0, 1.0, 0.25])
    noise = RowNoise(rng.integer(64), rng.integer(64), samples, scale, transposed)
    expected = y.clone()
    reference.perturb(x, expected, noise)
    padded = torch.full((y.numel() + 16,), 7.0, dtype=dtype)
    mine = padded[8:-8].view(y.shape).copy_(y)
    given = (mine.data_ptr(), samples.data_ptr(), scale.data_ptr(), rows, tokens, inputs or 0)
    packed = Perturbation(
        None if x is None else x.data_ptr(),
        *given,
        outputs,
        DTYPE_CODES[dtype],
        *noise[:2],
        transposed,
    )
    library.perturb(ctypes.byref(packed))
    tolerance = TOLERANCE[dtype]
    # Of the largest: the sums have other orders.
    error = (mine.float() - expected.float()).abs().max()
    assert float(error) <= tolerance * float(expected.float().abs().max())
    assert not torch.equal(mine[0], y[0])
    assert_same_bits(mine[2], y[2])
    assert torch.equal(padded[[*range(8), *range(-8, 0)]], torch.full((16,), 7.0, dtype=dtype))
    if x is None:
        assert_same_bits(mine, expected)


@pytest.mark.parametrize("coef", [0.0, -0.0])
def test_terms_without_coefficient_leave_every_bit(check, rng, coef):
    """Negative zeros and the payloads of NaNs too; adding a zero would change them."""
    bits = rng.weights(5000, torch.bfloat16).view(torch.int16)
    bits[::5] = -0x8000
    bits[1::7] = 0x7FA5
    program = zk.Program(rng.integers(40), [coef] * 40, "rademacher")
    check({"w": bits.view(torch.bfloat16)}, program)


def test_signs_on_tensor_cores(library, rng):
    """The products give each lane its own 32 signs as exactly +1 and -1."""
    signs = torch.tensor(rng.integers(32, bits=32), dtype=torch.int64)
    signs[:2] = torch.tensor([0, 0xFFFFFFFF])
    words, z = signs.to(torch.uint32), torch.full((32, 32), torch.nan)
    library.unpack(ctypes.c_void_p(words.data_ptr()), ctypes.c_void_p(z.data_ptr()))
    expected = 1 - 2 * (signs[:, None] >> torch.arange(32) & 1)
    assert torch.equal(z, expected.float())


@pytest.mark.covering(coef=[0.0, 1e-3], decay=[0.0, 0.1])
def test_no_coefficient_and_decay(check, rng, rounding, coef, decay):
    program = zk.Program(rng.integer(64), coef, rounding=rounding, decay=decay)
    weights = {str(dtype): rng.weights(5000, dtype) for dtype in DTYPES}
    check(weights, program, singles=(True, False))


@pytest.mark.covering(coef=[1e-3, 3e38, 1e-38], terms=[1, 3])
def test_special_values(check, rng, dtype, rounding, coef, terms):
    info = torch.finfo(dtype)
    special = [torch.inf, -torch.inf, torch.nan, info.max, info.min, info.tiny, 0.0, -0.0]
    special.append(info.smallest_normal * info.eps)
    weights = rng.weights(8192, dtype)
    weights[100:4096:37] = torch.tensor(special * 12, dtype=dtype)
    call = (rng.integers(terms), [coef] * terms, "rademacher", rounding, rng.integers(terms))
    program = zk.Program(*call, rounds=[1] * terms)
    check({"w": weights}, program, singles=(True, False) if terms == 1 else (False,))
