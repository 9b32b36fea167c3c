"""compute-sanitizer over the kernels, where the tool is there and the machine lets it work.

    python -m benchmarks.gpu.test_sanitizer BACKEND DEVICE DISTRIBUTION ...

runs a little of every kernel, which the tool watches, and compares it with the cpu backend.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys

import pytest
import torch

import zorba_kernels as zk
from benchmarks.bench import Bench
from benchmarks.gpu.stages import tool
from zorba_kernels.noise import DISTRIBUTIONS

pytestmark = pytest.mark.gpu

# Signs are shared by the lanes of a warp: only they can race.
SIGNS = ("rademacher", "rank1")
RUNS = {"memcheck": DISTRIBUTIONS, "racecheck": SIGNS, "initcheck": DISTRIBUTIONS}
SIZES = (1, 7, 513, 4096, 9001)
DONE = "the sanitized kernels gave the right bits"


@pytest.mark.parametrize("place", [0, 1], ids=["first backend", "second backend"])
@pytest.mark.parametrize("name", RUNS)
def test_sanitizer(bench: Bench, name: str, place: int) -> None:
    checker = tool("compute-sanitizer")
    if checker is None or place >= len(bench.backends):
        pytest.skip("compute-sanitizer or the backend is not there")
    command = [checker, "--tool", name, sys.executable, "-m", "benchmarks.gpu.test_sanitizer"]
    command += [bench.backends[place], bench.device.type, *RUNS[name]]
    # Memory that is not pooled, so that each tensor has bounds of its own.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    limit = max(1.0, bench.left() / 2)
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"left out: it did not end within {limit:.0f} s")
    output = done.stdout + done.stderr
    errors = errors_of(output)
    if errors is None:
        pytest.skip(f"left out: it says nothing about the kernels: {output[-1000:]}")
    assert errors == 0, output[-6000:]
    assert DONE in output, output[-6000:]


def errors_of(output: str) -> int | None:
    """Returns the errors that the tool counted, or None where it could not watch."""
    memory = re.search(r"ERROR SUMMARY: (\d+) error", output)
    races = re.search(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) error", output)
    found = memory or races
    if found is None or "device not supported" in output.lower():
        return None
    return int(found[1])


def main(backend: str, device: str, *distributions: str) -> None:
    """Tensors come from the host, so that few kernels of others are watched too."""
    generator = torch.Generator().manual_seed(1)
    dtypes, programs = (torch.float32, torch.bfloat16, torch.float16), ((1, None), (5, [2, 3]))
    for distribution, dtype, rounding, (terms, rounds) in itertools.product(
        distributions, dtypes, zk.noise.ROUNDINGS, programs
    ):
        start = {f"{n}": torch.randn(n, generator=generator).to(dtype) for n in SIZES}
        places = ("cpu", device, device)
        expected, table, out = (
            zk.ParamTable({n: w.to(place, copy=True) for n, w in start.items()}) for place in places
        )
        call = (range(terms), [1e-3] * terms, distribution, rounding)
        zk.add_noise_(expected, *call, rounds=rounds, backend="cpu")
        zk.add_noise(table, out, *call, rounds=rounds, backend=backend)
        zk.add_noise_(table, *call, rounds=rounds, backend=backend)
        same = zk.fingerprint(expected, backend="cpu")
        assert {zk.fingerprint(got, backend=backend) for got in (table, out)} == {same}
    for distribution, offset in itertools.product(distributions, (0, 5)):
        key = {"seed": 1, "stream": 2, "distribution": distribution, "offset": offset}
        z = zk.noise(9001, **key, device=device, backend=backend)
        assert torch.equal(z.cpu(), zk.noise(9001, **key))
    print(DONE)


if __name__ == "__main__":
    main(*sys.argv[1:])
