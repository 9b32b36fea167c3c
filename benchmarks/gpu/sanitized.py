"""A little of every kernel, for compute-sanitizer to watch.

    python -m benchmarks.gpu.sanitized BACKEND DEVICE DISTRIBUTION [DISTRIBUTION]

Tensors are copied from the host and no memory is pooled, so that each has bounds of its own and few
kernels of others are watched too. Results are compared with the cpu backend.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch

import zorba_kernels as zk

SIZES = (1, 7, 513, 4096, 9001)
DONE = "the sanitized kernels gave the right bits"


def main(backend: str, device: str, distributions: Iterable[str]) -> None:
    generator = torch.Generator().manual_seed(1)
    for distribution in distributions:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for rounding in ("nearest", "stochastic"):
                for seeds, rounds in (([1], None), ([1, 2, 3, 4, 5], [2, 3])):
                    start = {f"{n}": torch.randn(n, generator=generator).to(dtype) for n in SIZES}
                    call = (seeds, [1e-3] * len(seeds), distribution, rounding)
                    expected = zk.ParamTable({n: w.clone() for n, w in start.items()})
                    zk.add_noise_(expected, *call, rounds=rounds, backend="cpu")
                    table = zk.ParamTable({n: w.to(device, copy=True) for n, w in start.items()})
                    out = zk.ParamTable({n: w.to(device, copy=True) for n, w in start.items()})
                    zk.add_noise(table, out, *call, rounds=rounds, backend=backend)
                    zk.add_noise_(table, *call, rounds=rounds, backend=backend)
                    same = zk.fingerprint(expected, backend="cpu")
                    for got in (table, out):
                        assert zk.fingerprint(got, backend=backend) == same
        for offset in (0, 5):
            z = zk.noise(
                9001, seed=1, stream=2, distribution=distribution, device=device, offset=offset,
                backend=backend,
            )  # fmt: skip
            right = zk.noise(9001, seed=1, stream=2, distribution=distribution, offset=offset)
            assert torch.equal(z.cpu(), right)
    print(DONE)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
