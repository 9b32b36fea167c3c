"""Where the weights of an idle block wait: a memory-mapped file, or pinned memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_LENGTH_BYTES = 8  # of a safetensors file: length of the JSON header, little-endian


def to_file(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Writes tensors to a safetensors file and maps them from there.

    The mapping is shared: writes to the tensors go to the file, and the system may drop their pages
    and read them again. They take no memory of the process's own.

    Args:
        path: of the file; an existing one is replaced.
        tensors: on any device; only read.

    Returns:
        CPU tensors of the same names, shapes and dtypes, each with a storage of its own.
    """
    from safetensors.torch import save_file  # optional: offloading needs it, and nothing else here

    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # A new file, not the old one rewritten: another process may have that mapped.
    path.unlink(missing_ok=True)
    save_file(kept, path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
    # Not by safetensors' own loader: it maps privately, so that writes would become memory of the
    # process, page by page.
    mapped: dict[str, Tensor] = {}
    for name, tensor in kept.items():
        start, end = header[name]["data_offsets"]
        if start == end:
            mapped[name] = torch.empty_like(tensor)
            continue
        offset = _LENGTH_BYTES + length + start
        raw = np.memmap(path, dtype=np.uint8, mode="r+", offset=offset, shape=(end - start,))
        mapped[name] = torch.from_numpy(raw).view(tensor.dtype).view(tensor.shape)
    return mapped


def to_pinned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors to page-locked memory, from where a GPU takes them while it computes."""
    return {
        name: torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t.detach())
        for name, t in tensors.items()
    }
