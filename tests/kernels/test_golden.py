"""Frozen bits: what version 1 of the contract means, on every backend."""

from __future__ import annotations

import pytest

import zorba_kernels as zk
from tests.kernels import golden


def test_version():
    """New golden vectors need a new version, and a new version needs new vectors."""
    assert zk.NOISE_VERSION == zk.noise.NOISE_VERSION == 1
    assert zk.build_info()["noise_version"] == 1


@pytest.mark.parametrize("number", range(len(golden.NOISE_KEYS)))
def test_noise(server, number):
    assert golden.gaussian(golden.NOISE_KEYS[number]) == golden.GAUSSIAN[number]
    assert golden.rademacher(golden.NOISE_KEYS[number]) == golden.RADEMACHER[number]


@pytest.mark.parametrize("case", golden.WEIGHTS)
def test_weights(server, case):
    assert golden.weights(case) == golden.WEIGHTS[case]


def test_fingerprints(server):
    assert golden.fingerprints() == golden.FINGERPRINTS
