"""The count of issue slots in machine code: how it counts, and that no kernel got slower."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import replace

import pytest

from benchmarks.sass import pipes
from benchmarks.sass.__main__ import count_cuda, count_triton
from benchmarks.sass.disassembly import Code, find_tool, functions, resources, run_tool
from benchmarks.sass.flow import blocks_of, hot_paths
from benchmarks.sass.rows import Counted, Recorded, Row, cuda_rows
from zorba_kernels.build import build_info

TRITON = importlib.util.find_spec("triton") is not None
triton = pytest.mark.skipif(
    not TRITON or find_tool() is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="triton is not installed, has no cuobjdump, or is being interpreted",
)
BODY = ["FMUL R51, R51, R50"] * 24  # enough arithmetic to be a loop


def listing(*lines):
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


# --- The record ----------------------------------------------------------------------------------

ROW = Row(
    "cuda", "gaussian", "nearest", "bfloat16", decay=False, weights=32, slots=32 * 24,
    pipes={"fma": 32 * 24}, registers=128,
)  # fmt: skip
CUDA = {"cuda": "ptxas 13.0"}


def count_of(*rows, kernels=(), versions=CUDA):
    return Counted(list(rows), list(kernels), versions)


RECORDED = Recorded({}, {}).updated(count_of(ROW))


@pytest.mark.parametrize(
    ("counted", "message"),
    [
        (count_of(ROW), None),
        (count_of(replace(ROW, slots=32 * 26)), None),  # 8 % more
        (count_of(ROW, replace(ROW, dtype="float16")), "not recorded; .*--record"),
        (count_of(), "gaussian nearest bfloat16: recorded, but not found .*--record"),
        (count_of(ROW, kernels=[Code("k", [], 128, 8)]), "k: spills .8 bytes of stack"),
        (
            count_of(ROW, kernels=[Code("k", listing("LDL R1, [R2]", "STL [R2], R1"), 128, 0)]),
            "k: spills .*2 accesses of local memory",
        ),
        (count_of(ROW, ROW), "2 hot paths look alike"),
    ],
)
def test_failures(counted, message):
    found = list(RECORDED.failures(counted))
    assert len(found) == (message is not None)
    assert all(re.search(message, one) for one in found)


def test_a_limit_is_not_a_matter_of_records():
    counted = count_of(replace(ROW, slots=32 * 27))
    (found,) = RECORDED.updated(counted).failures(counted)
    assert "27.0 slots a weight; the limit is 26" in found


def test_more_than_recorded_names_both_compilers():
    slow = replace(ROW, decay=True, slots=32 * 27)
    recorded = RECORDED.updated(count_of(replace(slow, slots=32 * 24)))
    (found,) = recorded.failures(count_of(slow, versions={"cuda": "ptxas 14.0"}))
    said = (
        r"27.0 slots a weight, recorded are 24.0 \(\+12%.*by ptxas 14.0, recorded with ptxas 13.0"
    )
    assert re.search(said, found)
    (note,) = recorded.notes({"cuda": "ptxas 14.0"})
    assert "ptxas 13.0" in note
    assert recorded.notes(CUDA) == []


@pytest.mark.parametrize("others", [[ROW], []], ids=["counted now", "recorded"])
def test_triton_is_compared_with_cuda(others):
    versions = {"triton": ""} | (CUDA if others else {})
    found = []
    for n in (31, 32):
        row = replace(ROW, backend="triton", slots=32 * n)
        counted = count_of(*others, row, versions=versions)
        found += RECORDED.updated(counted).failures(counted)
    assert len(found) == 1
    assert "32.0 slots a weight; the limit is 31.2 (1.3 x CUDA's)" in found[0]


def test_what_was_not_counted_stays_recorded(tmp_path):
    file = tmp_path / "recorded.json"
    peer = replace(ROW, backend="tl.randn", slots=32 * 119)
    counted = count_of(peer, versions={"tl.randn": "triton 3.9"})
    RECORDED.updated(counted).save(file)
    read = Recorded.load(file)
    assert read.versions == {**CUDA, "tl.randn": "triton 3.9"}
    assert read.slots == {ROW.name: 24.0, peer.name: 119.0}
    assert list(read.failures(counted)) == []
    assert Recorded.load(tmp_path / "none.json") == Recorded({}, {})


# --- The kernels ---------------------------------------------------------------------------------


@pytest.mark.skipif(not build_info()["cuda"] or find_tool() is None, reason="built without CUDA")
def test_cuda_kernels():
    counted, recorded = count_cuda(), Recorded.load()
    limits = [recorded.limit_of(row, counted.rows) for row in counted.rows]
    assert sum(limit is not None for limit in limits) == 3
    assert list(recorded.failures(counted)) == []
    assert cuda_rows(Code("fingerprint_sum", listing("EXIT"), 8, 0)) == []  # another kernel


@triton
def test_triton_kernels():
    counted = count_triton()
    *ours, peer = counted.rows
    assert 80 < peer.slots_per_weight < 160
    assert (len(ours), len(counted.kernels)) == (38, 35)  # two of each perturbation
    # A loop with the 18 to 20 products of a Philox call.
    assert all(row.pipes["imad"] > 18 for row in ours)
    assert list(Recorded.load().failures(counted)) == []


@triton
@pytest.mark.parametrize("arch", [90, 80, 100])
def test_every_variant_compiles_without_spills(arch, tmp_path, full):
    """Also without contraction, approximations and flushed subnormals, which would change bits.

    All for sm_90, which Triton's cache has from the test above; every third for the others.
    """
    from benchmarks.sass.triton_code import compile_all
    from zorba_kernels.backends.triton_variants import variants

    every = list(variants())
    assert len(every) == 61
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
