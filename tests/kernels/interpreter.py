"""Corrections of Triton's interpreter, so that tests may demand the bits that a GPU gives.

It computes ``tl.fma`` as a product and a sum, rounded twice, and cuts a float32 off to make a
bfloat16 of it. GPUs round once, and to the nearest even.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a * b + c, rounded once.

    The product is exact in float64, the sum is rounded to odd there, and the way back to float32
    then rounds it (Boldo and Melquiond, 2008).
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = np.asarray(product + addend)
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    inexact_and_even = (error != 0) & ~np.isnan(error) & ((bits & 1) == 0)
    away = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where(inexact_and_even, bits + away, bits).view(np.float64)
    return odd.astype(np.float32)


def to_bfloat16(value: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16, ties to even; a NaN stays one."""
    bits = value.view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(value), 0x7FC0, nearest).astype(np.uint16)


def correct() -> None:
    """Makes the interpreter of this process round as processors do."""
    plain = InterpreterBuilder.cast_impl

    def cast(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(to_bfloat16(src.data), tl.bfloat16)
        return plain(self, src, dst_type)

    def create_fma(self, x, y, z):
        assert x.dtype.scalar == tl.float32
        with np.errstate(all="ignore"):
            return TensorHandle(fma(x.data, y.data, z.data), tl.float32)

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, *scope):
        patch_tensor(tensor, *scope)
        # Triton 3.6 calls int() on an array of one element, which numpy 2.4 refuses.
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = patch
    plain_call = InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        # Half of the time goes into patching ``tl`` again for each function that a kernel calls.
        if self.fn.__module__.startswith("zorba_kernels."):
            return self.rewrite()(*args, **kwargs)
        return plain_call(self, *args, **kwargs)

    InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)  # is dropped
    numpy_dtype = functools.cache(interpreter._get_np_dtype)
    address = np.dtype(np.uint64)
    interpreter._get_np_dtype = lambda t: address if t.scalar.is_ptr() else numpy_dtype(t.scalar)
    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fma = create_fma
