"""Threads that compile kernels of Triton."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def compiling_threads() -> Iterator[ThreadPoolExecutor]:
    """Two threads that compile, without garbage collection.

    Until CPython 3.11.8 the depth that ``ast.parse`` counts is shared by all threads: where a
    finalizer, run by a collection in the middle of a parse, lets the other thread parse, both fail
    with "AST constructor recursion depth mismatch" (github.com/python/cpython/issues/106905).
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with ThreadPoolExecutor(2) as pool:
            yield pool
    finally:
        if collecting:
            gc.enable()
