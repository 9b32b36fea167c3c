"""Frozen bits: what the noise contract means, on every backend: version 1, and 2 for rank1.

A change of any of these numbers is a new version of the contract: messages, logs and checkpoints
made before could not be replayed any more. To print them: ``python -m tests.kernels.test_golden``.
"""

from __future__ import annotations

import pytest
import torch

import zorba_kernels as zk

MAX64 = (1 << 64) - 1

# (seed, stream, sample, offset): seeds and streams above 2^63, indices above 2^32, last block.
NOISE_KEYS = [
    (0, 0, 0, 0),
    (1, 0xFBBB69D8A44D1A1F, 0, 0),
    (0x0123456789ABCDEF, 0xFEDCBA9876543210, 7, 123),
    (1 << 63, 1 << 63, (1 << 31) - 1, (1 << 32) + 3),
    (MAX64, MAX64, 1, (1 << 35) - 10),
]

GAUSSIAN: list[str] = [
    "3E8425DA 3EB39D21 BEFB7BEB BF06C855 BF62DF30 3DA359D8 BEADDD51 3EDEC878 BDEDE606 BF28B8AD",
    "BF0795D8 3EC9DAB9 3EE7CBCC BF6C5B00 BF0701CF BEF82C56 3F2CCF73 BDE2AAA0 BFDF026A 3EB5CB6F",
    "3F6C0B9B BF135E63 BE26982F 3F9BC513 3EA8E392 BE9E051E 3D211B0F BF709EB2 BF5345D7 BF408477",
    "BF22AE0E BEFC5D39 3F2C6764 3E8A85F1 3F618DEF BF60425E 3F897C4E BCD99207 BF225D68 BF9F90E3",
    "3E78C336 BEB9D69A 3EDA117A 3FC27CDA BF8A1637 BEA92A05 BFED0733 BE04FB7A 3F272120 BF07FF0F",
]
RADEMACHER: list[str] = [
    "-+-+-+--+++-+------++-+++--++--+-+--+++--+-+++---++-+--+-++++---",
    "-----+---+--++---+--+----+-++-+-+-+++---+--+-++---++-++-+-++-+++",
    "-++-+-++-+++-----++-++----+---+-++---+-+-+-----+--+++-+-+++++--+",
    "--+-+----+-+------+-+---+-++-+-+-+-+--+----+---+-++--+------+---",
    "+-++-+++--+-+--++---++-+--+-++-++-+++----++++++++--+++++++---+-+",
]
RANK1: list[str] = [
    "----+-+++++--+--++--+-+--+++-++-++-++--+-+-++-++--+-+-++-++--+-+-++-++--+-+-",
    "---+-+++++---++-+--+++-+----------+--++-++---+--++-++---+--++-++-++-++--+--+",
    "+-+++---++-++-+-+++-+-++++---+-+++++--+---+----++-+++-++++--+--+-++++--+---+",
    "++---+++-++-+--+--+++---+-+-+-+-+++++++-++-----+++-++-----+++-++--------+--+",
    "+-+----++-+++++--+--++--+-+---++--+-+++--++--+-+++--++-+-+---++--++-+---++--",
]
WEIGHTS: dict[str, str] = {
    "float32 gaussian nearest": "BE93CCC0 BE95798C 3E3C04D9 3E3687C9 3E3EF028 3E41F427",
    "float32 gaussian stochastic": "BE93CCC0 BE95798C 3E3C04D9 3E3687C9 3E3EF028 3E41F427",
    "float32 rademacher nearest": "BE98D456 BE965187 3E397E1F 3E3A706A 3E406F12 3E3E5C09",
    "float32 rademacher stochastic": "BE98D456 BE965187 3E397E1F 3E3A706A 3E406F12 3E3E5C09",
    "bfloat16 gaussian nearest": "BE94 BE96 3E3C 3E37 3E3F 3E42",
    "bfloat16 gaussian stochastic": "BE94 BE95 3E3B 3E37 3E3F 3E43",
    "bfloat16 rademacher nearest": "BE99 BE97 3E3A 3E3A 3E41 3E3E",
    "bfloat16 rademacher stochastic": "BE99 BE96 3E3A 3E3B 3E41 3E3F",
    "float16 gaussian nearest": "B49F B4AC 31DF 31B4 31F8 320F",
    "float16 gaussian stochastic": "B49F B4AB 31DF 31B4 31F7 3210",
    "float16 rademacher nearest": "B4C7 B4B3 31CB 31D3 3203 31F3",
    "float16 rademacher stochastic": "B4C7 B4B2 31CB 31D3 3203 31F3",
    "float32 rank1 nearest": "BE985294 BE965187 3E366E50 3E3E7943 3E417298 3E44712B",
    "float32 rank1 stochastic": "BE985294 BE965187 3E366E50 3E3E7943 3E417298 3E44712B",
    "bfloat16 rank1 nearest": "BE99 BE97 3E37 3E3F 3E42 3E45",
    "bfloat16 rank1 stochastic": "BE98 BE96 3E36 3E3F 3E42 3E45",
    "float16 rank1 nearest": "B4C3 B4B3 31B3 31F3 320B 3223",
    "float16 rank1 stochastic": "B4C3 B4B2 31B3 31F3 320B 3224",
}
FINGERPRINTS: list[int] = [
    0x0000000000000000,
    0x7162ECBAB807221C,
    0xE78C6BD7099BCF8B,
    0x5F9FEC4E8138C871,
    0x3AF500AD5D0DBC9C,
]


def gaussian(key: tuple[int, int, int, int]) -> str:
    seed, stream, sample, offset = key
    z = zk.noise(10, seed=seed, stream=stream, sample=sample, offset=offset)
    return " ".join(f"{bits & 0xFFFFFFFF:08X}" for bits in z.view(torch.int32).tolist())


def rademacher(key: tuple[int, int, int, int]) -> str:
    seed, stream, sample, offset = key
    place = {"sample": sample, "offset": min(offset, (1 << 35) - 64)}
    z = zk.noise(64, seed=seed, stream=stream, **place, distribution="rademacher")
    return "".join("+" if value > 0 else "-" for value in z.tolist())


def rank1(key: tuple[int, int, int, int]) -> str:
    """Signs of a vector, and of rows of 11 elements from an offset inside of a row."""
    seed, stream, sample, offset = key
    call = {"seed": seed, "stream": stream, "sample": sample, "distribution": "rank1"}
    vector = zk.noise(32, **call, offset=min(offset, (1 << 35) - 32))
    matrix = zk.noise((4, 11), **call, offset=min(offset, (1 << 35) - 44))
    signs = ["+" if value > 0 else "-" for value in [*vector.tolist(), *matrix.view(-1).tolist()]]
    return "".join(signs)


def weights(case: str) -> str:
    """Bits of six weights after two rounds, across the place where a rounding call is shared."""
    name, distribution, rounding = case.split()
    dtype: torch.dtype = getattr(torch, name)
    tensor = (torch.arange(512, dtype=torch.float32) / 512 - 0.3).to(dtype)
    parameter = "layers.0.weight"
    table = zk.ParamTable(
        {parameter: tensor}, offsets={parameter: (1 << 33) + 5},
        columns={parameter: 100} if distribution == "rank1" else None,
    )  # fmt: skip
    zk.add_noise_(
        table, [MAX64 - 1, 5, 1 << 63], [0.003, -0.0005, 0.001], distribution, rounding,
        [11, MAX64], samples=[0, 1, 2], rounds=[2, 1], decay=0.01,
    )  # fmt: skip
    mask = 0xFFFFFFFF if dtype == torch.float32 else 0xFFFF
    raw = tensor.view(torch.int32 if dtype == torch.float32 else torch.int16)
    width = 8 if dtype == torch.float32 else 4
    return " ".join(f"{v & mask:0{width}X}" for v in torch.cat([raw[:2], raw[249:253]]).tolist())


def tables() -> list[zk.ParamTable]:
    """Tables whose fingerprints are frozen: nothing, an empty one, ragged lanes, all dtypes."""
    ramp = torch.arange(1000, dtype=torch.float32) / 7
    return [
        zk.ParamTable({}),
        zk.ParamTable({"empty": torch.zeros(0)}),
        zk.ParamTable({"zero": torch.zeros(1, dtype=torch.bfloat16)}),
        zk.ParamTable({"w": ramp}),
        zk.ParamTable({"w": ramp[:997].half(), "v": ramp[:3].bfloat16(), "u": ramp[:5]}),
    ]


def test_version():
    """New golden vectors need a new version, and a new version needs new vectors."""
    assert zk.NOISE_VERSION == zk.noise.NOISE_VERSION == 2
    assert zk.build_info()["noise_version"] == 2


@pytest.mark.parametrize("number", range(len(NOISE_KEYS)))
def test_noise(server, number):
    assert gaussian(NOISE_KEYS[number]) == GAUSSIAN[number]
    assert rademacher(NOISE_KEYS[number]) == RADEMACHER[number]
    assert rank1(NOISE_KEYS[number]) == RANK1[number]


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(server, case):
    assert weights(case) == WEIGHTS[case]


def test_fingerprints(server):
    assert [zk.fingerprint(table) for table in tables()] == FINGERPRINTS


if __name__ == "__main__":
    print("GAUSSIAN =", [gaussian(key) for key in NOISE_KEYS])
    print("RADEMACHER =", [rademacher(key) for key in NOISE_KEYS])
    print("RANK1 =", [rank1(key) for key in NOISE_KEYS])
    print("WEIGHTS =", {case: weights(case) for case in WEIGHTS})
    print("FINGERPRINTS =", [f"0x{zk.fingerprint(table):016X}" for table in tables()])
