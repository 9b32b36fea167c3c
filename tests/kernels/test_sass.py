"""The count of issue slots in machine code: how it counts, and that no kernel got slower."""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.sass import pipes
from benchmarks.sass.__main__ import count_cuda, count_triton
from benchmarks.sass.disassembly import Code, find_tool, functions, resources, run_tool
from benchmarks.sass.flow import blocks_of, hot_paths
from benchmarks.sass.recorded import Recorded, failures, limit_of, notes
from benchmarks.sass.rows import Row, rows_of_cuda, triton_rows
from benchmarks.sass.terms import additions, term_loops
from zorba_kernels.build import build_info

TRITON = importlib.util.find_spec("triton") is not None
triton = pytest.mark.skipif(
    not TRITON or find_tool() is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="triton is not installed, has no cuobjdump, or is being interpreted",
)
BODY = ["FMUL R51, R51, R50"] * 24  # enough arithmetic to be a loop


def listing(*lines):
    """The instructions of a kernel that cuobjdump would print so."""
    text = "\n".join(f"        /*{16 * k:04x}*/  {line} ;" for k, line in enumerate(lines))
    ((name, instructions),) = functions(f"\t\tFunction : kernel\n{text}\n")
    assert name == "kernel"
    assert len(instructions) == len(lines)
    return instructions


# --- Reading -------------------------------------------------------------------------------------


def test_instruction():
    (i,) = listing("@!P1 STG.E.EF.128 desc[UR4][R24.64+0x10], R12")
    assert (i.address, i.guard, i.opcode, i.stored_bytes) == (0, "@!P1", "STG", 16)
    assert i.is_wide_store
    assert listing("ST.E.U16 [R2.64], R5")[0].stored_bytes == 2
    assert listing("STS.128 [R2], R4")[0].stored_bytes == 0


def test_pipes():
    path = listing(
        "FFMA R0, R1, R2, R3", "LOP3.LUT R0, R1, R2, RZ, 0x3c, !PT", "IMAD R0, R1, R2, R3",
        "MUFU.RSQ R0, R1", "LDS.U8 R0, [R1]", "BRA 0x0",
    )  # fmt: skip
    counts = pipes.count_pipes(path)
    assert counts == {"fma": 1, "alu": 1, "imad": 1, "xu": 1, "memory": 1, "tensor": 0, "other": 1}
    assert pipes.bound(counts) == 8
    assert pipes.bound({**counts, "xu": 0, "fma": 9}) == 13
    assert pipes.bound({**counts, "xu": 0, "alu": 40}) == 80
    assert 28 < pipes.budget("bfloat16") < 32
    assert pipes.budget("float32") == 2 * pipes.budget("float16")


# --- Paths ---------------------------------------------------------------------------------------


def test_straight_path_passes_the_store_and_not_the_slow_part():
    code = listing(
        "@P0 EXIT",  # 0x00: the shortest way out stores nothing
        "@P1 BRA 0x30",
        "MUFU.SIN R4, R4",  # slow
        "STG.E.64 [R2.64], R4",  # 0x30
        "EXIT",
    )
    (path,) = hot_paths(blocks_of(code))
    assert [i.opcode for i in path] == ["EXIT", "BRA", "STG", "EXIT"]


def test_loop_passes_the_store_and_its_arithmetic():
    body = ["LDG.E.128 R4, [R2.64]", *BODY, "@P1 BRA 0x230"]
    slow = ["CALL.REL.NOINC 0x900"] * 8
    code = listing("MOV R1, R2", *body, *slow, "STG.E.128 [R2.64], R4", "@P0 BRA 0x10", "EXIT")
    assert code[0x230 // 16].opcode == "STG"
    (path,) = hot_paths(blocks_of(code))
    assert len(path) == len(body) + 2
    assert not any(i.opcode in ("CALL", "MOV") for i in path)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["MOV R1, R2", "EXIT"], "stores anything"),
        (["STG.E.64 [R2.64], R4", "@P0 BRA 0x0", "EXIT"], "stores in a loop"),
    ],
)
def test_a_kernel_without_a_hot_path(lines, said):
    with pytest.raises(ValueError, match=said):
        hot_paths(blocks_of(listing(*lines)))


# --- Terms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "sums"),
    [
        (["FADD R1, R1, R9"], {1: 1}),
        (["FADD R1, R9, R1", "FFMA R2, R8, R9, R2"], {1: 1, 2: 1}),
        (["FADD R5, R1, R9", "FADD R1, R5, R9"], {1: 2}),  # two terms a round
        (["FADD R5, R1, R9", "IMAD.MOV.U32 R1, RZ, RZ, R5"], {1: 1}),
        (["FFMA R1, R1, R8, R9"], {}),  # a polynomial
        (["FMUL R1, R8, R9", "FADD R1, R1, R9"], {}),  # begins anew each round
        (["LDG.E R9, [R2.64]", "FADD R1, R1, R9"], {1: 1}),
        (["LDG.E.128 R0, [R2.64]", "FADD R1, R1, R9"], {}),  # overwritten with the others
        # Either of two instructions adds, whatever stands between them but a new predicate.
        (["@P0 FADD R1, R1, R9", "FADD R2, R2, R9", "@!P0 FADD R1, R1, -R9"], {1: 1, 2: 1}),
        (["@P0 FADD R1, R1, R9", "R2P PR, R7, 0x7f", "@!P0 FADD R1, R1, -R9"], {1: 2}),
        (["@P0 FADD R1, R1, R9", "ISETP.NE.AND P0, PT, R7", "@!P0 FADD R1, R1, -R9"], {1: 2}),
    ],
)
def test_additions(lines, sums):
    assert additions(listing("R2P PR, R7, 0x7f", *lines)) == sums


def test_term_loop():
    adds, store = [f"FADD R{k}, R{k}, R40" for k in range(16)], "STG.E.128 [R2.64], R4"
    blocks = blocks_of(listing(*BODY, *adds, "@P0 BRA 0x0", store, "EXIT"))
    (loop,) = term_loops(blocks, least=16)
    assert loop.added == 16
    assert loop.slots_per_weight == (len(BODY) + 17) / 16
    assert term_loops(blocks, least=17) == []
    storing = blocks_of(listing(*BODY, *adds, store, "@P0 BRA 0x0", "EXIT"))
    assert term_loops(storing, least=16) == []


@triton
@pytest.mark.parametrize("name", ["add_constant", "add_constant_in_loop", "add_terms"])
def test_triton_shapes(name):
    """8 float32 weights a lane: in a straight line, in a loop, and with a loop over terms."""
    from benchmarks.sass.triton_code import cubin_of
    from tests.kernels import triton_shapes

    many = name == "add_terms"
    types = {"p_w": "*fp32", "p_coefs": "*fp32", "n": "i32", "terms": "i32", "value": "fp32"}
    cubin = cubin_of(
        getattr(triton_shapes, name), types, {"block": 1024}, ("p_w",) if many else ("p_w", "n"),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    about = dict.fromkeys(("backend", "kernel", "distribution", "rounding"), "-")
    terms = "many" if many else "one"
    (row,) = triton_rows(cubin, **about, terms=terms, dtype="float32", decay=False)
    assert not row.spills
    if many:
        assert row.terms == "each"
        assert row.weights % 8 == 0  # the compiler may take several terms at once
        assert row.pipes["fma"] == row.weights  # one addition each
    else:
        assert row.weights == 8
        assert row.pipes["fma"] == (8 if name == "add_constant" else 8 * 16)
        assert row.pipes["memory"] >= 4  # loads and stores of 16 bytes


# --- The record ----------------------------------------------------------------------------------

ROW = Row(
    "cuda", "add_noise/single", "gaussian", "nearest", "one", "bfloat16", decay=False, weights=32,
    slots=32 * 24, pipes={"fma": 32 * 24}, registers=128, stack_bytes=0, local_accesses=0,
)  # fmt: skip
VERSIONS = {"cuda": "ptxas 13.0"}
RECORDED = Recorded({}, {}).updated([ROW], VERSIONS)


def test_as_recorded():
    assert failures([ROW], VERSIONS, RECORDED) == []
    assert failures([replace(ROW, slots=32 * 26)], VERSIONS, RECORDED) == []  # 8 % more


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, replace(ROW, dtype="float16")], "not recorded; .*--record"),
        ([], "gaussian nearest one bfloat16: recorded, but not found .*--record"),
        ([replace(ROW, stack_bytes=8)], "spills .8 bytes of stack"),
        ([replace(ROW, local_accesses=2)], "2 accesses of local memory"),
        ([ROW, ROW], "2 hot paths look alike"),
    ],
)
def test_failures(rows, message):
    (found,) = failures(rows, VERSIONS, RECORDED)
    assert re.search(message, found)


def test_a_limit_is_not_a_matter_of_records():
    row = replace(ROW, slots=32 * 27)
    (found,) = failures([row], VERSIONS, RECORDED.updated([row], VERSIONS))
    assert "27.0 slots a weight; the limit is 26" in found


def test_more_than_recorded_names_both_compilers():
    slow = replace(ROW, decay=True, slots=32 * 27)
    recorded = RECORDED.updated([replace(slow, slots=32 * 24)], VERSIONS)
    (found,) = failures([slow], {"cuda": "ptxas 14.0"}, recorded)
    assert "27.0 slots a weight, recorded are 24.0 (+12%" in found
    assert "compiled by ptxas 14.0, recorded with ptxas 13.0" in found
    (note,) = notes({"cuda": "ptxas 14.0"}, recorded)
    assert "ptxas 13.0" in note
    assert notes(VERSIONS, recorded) == []


@pytest.mark.parametrize("others", [[ROW], []], ids=["counted now", "recorded"])
def test_triton_is_compared_with_cuda(others):
    rows = [replace(ROW, backend="triton", kernel="add_noise", slots=32 * n) for n in (31, 32)]
    versions = {row.backend: "" for row in [*others, rows[0]]}
    good, bad = (
        failures([*others, r], versions, RECORDED.updated([r], {"triton": ""})) for r in rows
    )
    assert good == []
    assert "32.0 slots a weight; the limit is 1.3 x CUDA's 24.0" in bad[0]


def test_what_was_not_counted_stays_recorded(tmp_path):
    file = tmp_path / "recorded.json"
    peer = replace(ROW, backend="peer", slots=32 * 119)
    RECORDED.updated([peer], {"peer": "triton 3.9"}).save(file)
    read = Recorded.load(file)
    assert read.versions == {"cuda": "ptxas 13.0", "peer": "triton 3.9"}
    assert read.slots == {ROW.name: 24.0, peer.name: 119.0}
    assert failures([peer], {"peer": "triton 3.9"}, read) == []
    assert Recorded.load(tmp_path / "none.json") == Recorded({}, {})


# --- The kernels ---------------------------------------------------------------------------------


@pytest.mark.skipif(not build_info()["cuda"] or find_tool() is None, reason="built without CUDA")
def test_cuda_kernels():
    """No spills, nothing over its limit, nothing more than 10 % over its record."""
    rows, versions = count_cuda()
    assert sum(limit_of(row) is not None for row in rows) == 3
    assert failures(rows, versions, Recorded.load()) == []
    assert rows_of_cuda(Code("fingerprint_sum", listing("EXIT"), 8, 0)) == []  # another kernel


@triton
def test_triton_kernels():
    rows, versions = count_triton()
    (peer,) = (row for row in rows if row.backend == "peer")
    assert 80 < peer.slots_per_weight < 160
    ours = [row for row in rows if row.backend == "triton"]
    assert Counter(row.terms for row in ours) == {"one": 20, "each": 10}
    # A loop with the 18 to 20 products of a Philox call, not one over rounds that have no terms.
    assert all(row.pipes["imad"] > 18 for row in ours)
    each = [row for row in ours if row.terms == "each"]
    for distribution in ("gaussian", "rademacher"):  # the noise does not depend on the dtype
        slots = [row.slots_per_weight for row in each if row.distribution == distribution]
        assert max(slots) < 1.15 * min(slots)
    assert failures(rows, versions, Recorded.load()) == []


@triton
@pytest.mark.parametrize("arch", [90, 80, 100])
def test_every_variant_compiles_without_spills(arch, tmp_path, full):
    """Also without contraction, approximations and flushed subnormals, which would change bits.

    All for sm_90, which Triton's cache has from the test above; every third for the others.
    """
    from benchmarks.sass.triton_code import compile_all
    from zorba_kernels.backends.triton_variants import variants

    every = list(variants())
    assert len(every) == 33
    every = every if full or arch == 90 else every[arch // 10 % 3 :: 3]
    spills = {}
    for variant, compiled in zip(every, compile_all(every, arch), strict=True):
        assert not re.search(r"\.ftz|\.approx|\.full\.f32", compiled.asm["ptx"]), variant.name
        assert compiled.metadata.enable_fp_fusion is False
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        ((_, stack_bytes),) = resources(run_tool("-res-usage", str(cubin))).values()
        if stack_bytes:
            spills[variant.name] = stack_bytes
    assert spills == {}
