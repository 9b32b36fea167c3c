"""Philox4x32-10 against its published vectors, and the names of streams."""

from __future__ import annotations

import hashlib

import pytest
import torch

import zorba_kernels as zk
from zorba_kernels.backends import reference
from zorba_kernels.noise import canonical_name, philox4x32, stream_of

# Random123 1.14, tests/kat_vectors, rows "philox4x32 10": counter and key, result.
KNOWN = {
    "zeros": ("00000000 " * 6, "6627E8D5 E169C58D BC57AC4C 9B00DBD8"),
    "ones": ("FFFFFFFF " * 6, "408F276D 41C83B0E A20BC7C6 6D5451FD"),
    "pi": (
        "243F6A88 85A308D3 13198A2E 03707344 A4093822 299F31D0",
        "D16CFE09 94FDCCEB 5001E420 24126EA1",
    ),
}


@pytest.mark.parametrize("vector", KNOWN)
def test_published_vectors(vector):
    given, expected = (tuple(int(word, 16) for word in row.split()) for row in KNOWN[vector])
    counter, key = given[:4], given[4:]
    assert philox4x32(counter, key) == expected
    assert zk.noise.philox4x32(list(counter), list(key)) == expected
    stream, seed = counter[2] << 32 | counter[1], key[1] << 32 | key[0]
    words = reference._philox(torch.tensor([counter[0]]), stream, counter[3], seed)
    assert tuple(int(word) for word in words) == expected


def test_noise_is_made_of_philox_words(server, rng):
    """Rademacher noise shows every bit of every word, so it shows the whole generator."""
    key, block = rng.key(), rng.integer(28)
    seed, stream, sample = key.values()
    z = zk.noise(256, **key, distribution="rademacher", offset=128 * block)
    bits = []
    for number in (block, block + 1):
        counter = (number, stream & 0xFFFFFFFF, stream >> 32, sample)
        for word in philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)):
            bits += [word >> i & 1 for i in range(32)]
    assert [int(v < 0) for v in z.tolist()] == bits


@pytest.mark.parametrize(
    ("counter", "key"),
    [((0, 0, 0), (0, 0)), ((0, 0, 0, 0), (0,)), ((0, 0, 0, 1 << 32), (0, 0)), ((0,) * 4, (-1, 0))],
    ids=["three-words", "one-key", "too-large", "negative"],
)
def test_words_out_of_range_are_refused(counter, key):
    with pytest.raises(ValueError, match="philox4x32"):
        philox4x32(counter, key)


NAME = "model.layers.0.weight"
NAMES = {
    NAME: NAME,
    f"module.module.{NAME}": NAME,
    f"module._orig_mod.{NAME}": NAME,
    f"_orig_mod.module.{NAME}": NAME,
    "model.layers.0._orig_mod.weight": NAME,
    "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.weight": NAME,
    "model.layers.0._checkpoint_wrapped_module.weight": NAME,
    **{name: name for name in ("model.module.weight", "submodule.weight", "my_orig_mod")},
}


@pytest.mark.parametrize("name", NAMES)
def test_wrappers_leave_the_stream(name):
    assert canonical_name(name) == NAMES[name]
    assert (stream_of(name) == 0x625598898F6BC740) == (NAMES[name] == NAME)


def test_stream_is_the_start_of_sha256():
    name = "model.embed_tokens.weight"
    digest = hashlib.sha256(name.encode()).digest()
    assert stream_of(name) == sum(byte << 8 * i for i, byte in enumerate(digest[:8]))
    assert stream_of("é") == int.from_bytes(hashlib.sha256(b"\xc3\xa9").digest()[:8], "little")
