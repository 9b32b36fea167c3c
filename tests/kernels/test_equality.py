"""Every backend and instruction set equals the oracle bit for bit, however the work is cut up."""

from __future__ import annotations

import pytest
import torch

import zorba_kernels as zk
from tests.conftest import INTERPRETED
from tests.kernels.bits import DTYPES, assert_same_bits, changed, written
from tests.kernels.conftest import not_interpreted
from zorba_kernels.backends import reference

SPLITS = (7, 128, 2049) if INTERPRETED else (1, 7, 8, 127, 128, 257, 2047, 2048, 2049, 4000)


def test_noise(compiled, rng, distribution, size):
    for offset in (0, 3, 2045, rng.integer(34), zk.noise.MAX_ELEMENTS - size):
        call = {**rng.key(), "offset": offset, "distribution": distribution}
        assert_same_bits(zk.noise(size, **call), zk.noise(size, **call, backend="reference"))


EVERY = {"seed": 2026, "stream": 1, "sample": 0}


@pytest.fixture(scope="module")
def every():
    """4 million normals of the oracle, in which all 65,536 radii and 32,768 angles occur."""
    index = torch.arange(1 << 22)
    words, _ = reference._words_at(index, 8, EVERY["stream"], EVERY["sample"], EVERY["seed"])
    assert len(torch.unique(words & 0xFFFF)) == 1 << 16
    assert len(torch.unique(words >> 16)) == 1 << 16
    return torch.stack(reference._box_muller(words), dim=2).reshape(-1)


@not_interpreted("half a minute; test_triton.py has every radius and angle in one launch")
def test_every_radius_and_angle(compiled, every):
    assert_same_bits(zk.noise(len(every), **EVERY), every)


@pytest.mark.covering(terms=[1, 2, 5], decay=[None, 0.01])
def test_add_noise(compiled, rng, dtype, rounding, distribution, size, terms, decay):
    weights = {"w": rng.weights(size, dtype)}
    # One coefficient is large, so that some weight changes in every dtype.
    seeds, coefs = rng.integers(terms), torch.cat([torch.tensor([0.5]), rng.coefs(terms - 1)])
    call = {"distribution": distribution, "rounding": rounding, "decay": decay}
    call["samples"] = rng.integers(terms, bits=31)
    expected = changed(weights, seeds, coefs, **call, backend="reference")
    assert_same_bits(written(weights, seeds, coefs, **call, backend="reference"), expected)
    assert_same_bits(changed(weights, seeds, coefs, **call), expected)
    assert_same_bits(written(weights, seeds, coefs, **call), expected)
    assert size < 1000 or not torch.equal(expected["w"], weights["w"])


def test_decay_alone(server, rng, dtype):
    weights = rng.weights(1000, dtype)
    mine = changed({"w": weights}, [], [], decay=0.5)["w"]
    assert_same_bits(mine, (weights.float() + weights.float() * -0.5).to(dtype))


def test_a_shard_is_a_slice_of_the_whole(server, rng, dtype, rounding, distribution):
    call, start = {**rng.key(), "distribution": distribution}, rng.integer(34)
    weights = rng.weights(4097, dtype)
    args = (rng.integers(2), rng.coefs(2), distribution, rounding)
    whole, noise = changed({"w": weights}, *args)["w"], zk.noise(4097, **call, offset=start)
    for split in SPLITS:
        for offset, part in ((0, weights[:split]), (split, weights[split:])):
            shard = changed({"w": part}, *args, offsets={"w": offset})["w"]
            assert_same_bits(shard, whole[offset : offset + len(part)])
            z = zk.noise(len(part), **call, offset=start + offset)
            assert_same_bits(z, noise[offset : offset + len(part)])


def test_noise_is_what_add_noise_adds(server, rng, distribution):
    name, seed, sample = "layer.weight", rng.integer(64), rng.integer(31)
    mine = changed({name: torch.zeros(1000)}, seed, 1.0, distribution, samples=sample)[name]
    stream = zk.noise.stream_of(name)
    z = zk.noise(1000, seed=seed, stream=stream, sample=sample, distribution=distribution)
    assert_same_bits(mine, z)


def test_noise_shape_is_row_major(server, rng):
    call = rng.key()
    assert_same_bits(zk.noise((5, 7, 3), **call).reshape(-1), zk.noise(105, **call))
    assert zk.noise((), **call).shape == ()
    assert zk.noise((4, 0), **call).shape == (4, 0)


def test_indices_beyond_32_bits(server, distribution):
    """Not those of 2^32 before, and not beyond the last one that there is."""
    call = {"seed": 1, "stream": 2, "distribution": distribution}
    last = zk.noise.MAX_ELEMENTS - 100
    z = zk.noise(100, **call, offset=last)
    assert not torch.equal(z, zk.noise(100, **call, offset=last - (1 << 32)))
    with pytest.raises(ValueError, match="outside"):
        zk.noise(100, **call, offset=last + 1)


@not_interpreted("it has no threads; test_triton.py has several tiles")
@pytest.mark.usefixtures("threads")
def test_threads(compiled, rng, dtype, rounding, distribution):
    """More pieces than threads: 300,000 elements are ten pieces of work and a ragged end."""
    weights = {"a": rng.weights(300_001, dtype), "b": rng.weights(63, dtype)}
    args, offsets = (rng.integers(2), rng.coefs(2), distribution, rounding), {"a": 2045}
    expected = changed(weights, *args, offsets=offsets, backend="reference")
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        assert_same_bits(changed(weights, *args, offsets=offsets), expected)


@pytest.mark.covering(shift=[0, 1, 32])
def test_out_of_place_at_any_alignment(compiled, rng, dtype, distribution, shift):
    """Whole tiles and ragged ends, and nothing beside the target is written."""
    weights = rng.weights(3 * 2048 + 5, dtype)
    for offset in (0, 2048 - 32, 3):
        room = torch.full((len(weights) + 64,), 7.0, dtype=dtype)
        out = room[shift : shift + len(weights)]
        tables = [zk.ParamTable({"w": t}, offsets={"w": offset}) for t in (weights, out)]
        zk.add_noise(*tables, 1, 0.1, distribution)
        expected = changed({"w": weights}, 1, 0.1, distribution, offsets={"w": offset})["w"]
        assert_same_bits(out, expected)
        out.fill_(7.0)
        assert bool((room == 7.0).all())


def test_out_of_place_with_zero_coefs_copies(server, rng, dtype):
    weights = {"w": rng.weights(1000, dtype)}
    assert_same_bits(written(weights, 1, 0.0, rounding="stochastic"), weights)


def test_groups(server, rng, dtype, rounding):
    weights = {name: rng.weights(500, dtype) for name in "abcd"}
    groups = {"b": 2, "c": 1, "d": 2}
    seeds, coefs = rng.integers(3), rng.coefs(3, 3)
    together = changed(weights, seeds, coefs, groups=groups, rounding=rounding)
    for name, weight in weights.items():
        alone = changed({name: weight}, seeds, coefs[groups.get(name, 0)], rounding=rounding)
        assert_same_bits(together[name], alone[name])


def test_order_of_terms_is_the_order_of_the_sum(server, rng):
    weights = rng.weights(4097, torch.float32)
    seeds, samples, coefs = rng.integers(4), rng.integers(4, bits=31), [1.0, 1e-4, 0.3, 1e-6]
    total = torch.zeros(4097)
    for seed, sample, coef in zip(seeds, samples, coefs, strict=True):
        z = zk.noise(4097, seed=seed, stream=zk.noise.stream_of("w"), sample=sample)
        total = reference._fma(torch.tensor(coef), z, total)
    assert_same_bits(changed({"w": weights}, seeds, coefs, samples=samples)["w"], weights + total)


def test_rounds_in_one_call_equal_calls(server, rng, dtype, rounding, distribution):
    lengths = [2, 1, 0, 3]
    weights = {"a": rng.weights(1000, dtype), "b": rng.weights(300, dtype)}
    seeds, coefs, rounding_seeds = rng.integers(6), rng.coefs(2, 6), rng.integers(4)
    coefs[1, 2] = 0.0  # group 1 sits out the second round
    samples, decay = rng.integers(6, bits=31), torch.tensor([[0.0, 0.1, 0.0, 0.0]]).expand(2, -1)
    call = {"groups": {"b": 1}}
    how = (distribution, rounding)
    together = changed(
        weights, seeds, coefs, *how, rounding_seeds, samples=samples, rounds=lengths, decay=decay,
        **call,
    )  # fmt: skip
    start = 0
    for number, length in enumerate(lengths):
        part = slice(start, start + length)
        start += length
        weights = changed(
            weights, seeds[part], coefs[:, part], *how, rounding_seeds[number],
            samples=samples[part], decay=decay[:, number], **call,
        )  # fmt: skip
    assert_same_bits(together, weights)


def test_default_rounding_seed_is_the_first_of_the_round(server, rng):
    weights, seeds = {"w": rng.weights(1000, torch.bfloat16)}, rng.integers(3)
    args, call = (seeds, rng.coefs(3), "gaussian", "stochastic"), {"rounds": [2, 1]}
    implied = changed(weights, *args, **call)
    assert_same_bits(implied, changed(weights, *args, [seeds[0], seeds[2]], **call))


def test_many_parameters_of_many_kinds(compiled, rng, rounding):
    count = 16 if INTERPRETED else 40
    weights = {f"p{i}": rng.weights(rng.integer(11), DTYPES[i % 3]) for i in range(count)}
    call = {
        "groups": {f"p{i}": i % 4 for i in range(count)},
        "offsets": {f"p{i}": rng.integer(12) for i in range(count)},
        "rounding": rounding,
    }
    seeds, coefs = rng.integers(2), rng.coefs(4, 2)
    expected = changed(weights, seeds, coefs, **call, backend="reference")
    assert_same_bits(changed(weights, seeds, coefs, **call), expected)
    assert_same_bits(written(weights, seeds, coefs, **call), expected)


def test_reference_chunks(monkeypatch, rng, dtype):
    """The oracle works in chunks; where they end does not show."""
    weights = {"w": rng.weights(1000, dtype)}
    call = {"rounding": "stochastic", "backend": "reference"}
    whole, table = changed(weights, 1, 0.1, **call), zk.ParamTable(weights)
    hash_whole = zk.fingerprint(table, backend="reference")
    monkeypatch.setattr(reference, "CHUNK", 24)
    assert_same_bits(changed(weights, 1, 0.1, **call), whole)
    assert zk.fingerprint(table, backend="reference") == hash_whole
