"""Layers whose noise differs by row of a batch: no perturbed weight is ever made.

With rank-one noise ``scale * u v^T`` of its own for each row of the batch, a linear layer gives
``y = W x + b + scale (x . v) u``: one pass over x and y behind the product, and signs made from
seeds. It is what EGGROLL (arXiv 2511.16652) does with stored noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zorba_kernels import dispatch
from zorba_kernels.dispatch import RowNoise
from zorba_kernels.entry import DTYPE_CODES
from zorba_kernels.ops import _define, _unsigned, _words
from zorba_kernels.program import check_uint64


def perturb_(
    y: Tensor,
    x: Tensor | None = None,
    *,
    seed: int,
    stream: int,
    samples: Tensor,
    scale: Tensor,
    transposed: bool = False,
    backend: str | None = None,
) -> None:
    """Adds what rank-one noise of a weight adds to a layer's output, a noise for each row.

    ``y[r] += scale[r] * (x[r] . v) * u``, in float32, rounded to nearest; u and v are the signs of
    the rows and columns of ``noise(weight.shape, seed=, stream=, sample=samples[r],
    distribution="rank1")``. Without x, ``y[r] += scale[r] * u``: the noise of a bias.

    Args:
        y: the output W x, [rows, ..., m]; float32, bfloat16 or float16; modified in place.
        x: the layer's input, [rows, ..., n], or None.
        seed: uint64.
        stream: uint64 of the weight, ``zorba_kernels.noise.stream_of(name)``.
        samples: int64 [rows], below 2**31: which perturbation of the seed each row has.
        scale: float32 [rows]; sign times distance. A row of 0 keeps its bits.
        transposed: the weight is [n, m], as in GPT-2's Conv1D: x meets the signs of its rows.
        backend: name of a backend, or None for the best that can serve.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not belong together.
        RuntimeError: a gradient was asked for; there is none.
    """
    if torch.compiler.is_compiling():
        words = _words(seed), _words(stream)
        torch.ops.zorba_kernels.perturb_(y, x, *words, samples, scale, transposed, backend)
    else:
        _perturb(y, x, seed, stream, samples, scale, transposed, backend)


def perturbed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    seed: int,
    stream: int,
    samples: Tensor,
    scale: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Returns ``x W^T + b + scale (x . v) u``: a linear layer with a noise for each row.

    Row r is what ``linear(x[r], W + scale[r] * z)`` gives for ``z = noise(W.shape, seed=, stream=,
    sample=samples[r], distribution="rank1")``, to rounding.

    Args:
        x: [rows, ..., n]; float32, bfloat16 or float16.
        weight: [m, n] of the same dtype.
        bias: [m], or None; it has no noise (``perturb_`` adds that).
        seed: see ``perturb_``.
        stream: see ``perturb_``.
        samples: see ``perturb_``.
        scale: see ``perturb_``.
        backend: see ``perturb_``.

    Returns:
        [rows, ..., m].
    """
    y = torch.nn.functional.linear(x, weight, bias)
    perturb_(y, x, seed=seed, stream=stream, samples=samples, scale=scale, backend=backend)
    return y


def perturbed_vector(
    vector: Tensor,
    *,
    seed: int,
    stream: int,
    samples: Tensor,
    scale: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Returns a one-dimensional parameter as each row sees it: ``vector + scale[r] * u``.

    Args:
        vector: [n]; float32, bfloat16 or float16. For the other arguments see ``perturb_``.
        seed: uint64.
        stream: uint64.
        samples: int64 [rows].
        scale: float32 [rows].
        backend: name of a backend, or None.

    Returns:
        [rows, n].
    """
    y = vector.detach().repeat(len(samples), 1)  # a copy even for one row
    perturb_(y, seed=seed, stream=stream, samples=samples, scale=scale, backend=backend)
    return y


def _perturb(
    y: Tensor, x: Tensor | None, seed: int, stream: int, samples: Tensor, scale: Tensor,
    transposed: bool, backend: str | None,
) -> None:  # fmt: skip
    _check(y, x, samples, scale)
    noise = RowNoise(
        check_uint64(seed, "seed"), check_uint64(stream, "stream"),
        samples.contiguous(), scale.contiguous(), transposed,
    )  # fmt: skip
    if not y.numel():
        return
    rows = y.shape[0]
    # Autocast may compute in another dtype than the input has.
    flat = None if x is None else x.to(y.dtype).reshape(rows, -1, x.shape[-1]).contiguous()
    # As [rows, tokens, m]; a copy where that is no view.
    out = y.reshape(rows, -1, y.shape[-1]).contiguous()
    dispatch.choose(backend, y.device).perturb(flat, out, noise)
    if out.data_ptr() != y.data_ptr():
        y.copy_(out.view_as(y))


def _check(y: Tensor, x: Tensor | None, samples: Tensor, scale: Tensor) -> None:
    if y.dtype not in DTYPE_CODES:
        supported = ", ".join(map(str, DTYPE_CODES))
        raise TypeError(f"y has dtype {y.dtype}; supported are {supported}")
    if samples.dtype != torch.int64 or scale.dtype != torch.float32:
        raise TypeError(
            f"samples and scale are {samples.dtype} and {scale.dtype}; expected torch.int64 and "
            "torch.float32"
        )
    if y.ndim < 2 or samples.shape != y.shape[:1] or scale.shape != y.shape[:1]:
        raise ValueError(
            f"y, samples and scale have shapes {tuple(y.shape)}, {tuple(samples.shape)} and "
            f"{tuple(scale.shape)}; expected [rows, ..., m], [rows] and [rows]"
        )
    if x is not None and x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"x and y have shapes {tuple(x.shape)} and {tuple(y.shape)}; they may differ in the "
            "last dimension alone"
        )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (y, x)):
        raise RuntimeError("this noise has no gradient: call it under torch.no_grad()")
    places = {t.device for t in (y, x, samples, scale) if t is not None}
    if len(places) > 1:
        raise ValueError(f"the tensors are on several devices: {sorted(map(str, places))}")


_define(
    "perturb_(Tensor(a!) y, Tensor? x, Tensor seed, Tensor stream, Tensor samples, Tensor scale, "
    "bool transposed, str? backend) -> ()",
    lambda y, x, seed, stream, *rest: _perturb(y, x, _unsigned(seed), _unsigned(stream), *rest),
    lambda *arguments: None,
)
