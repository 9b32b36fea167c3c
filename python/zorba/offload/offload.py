"""Offload: a model whose idle blocks live on the host."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zorba.blocks import Block, find_blocks
from zorba.forward import replaced_forward
from zorba.offload.stream import BlockStream, bytes_of
from zorba.tables import padded_bytes

_offloads: weakref.WeakKeyDictionary[nn.Module, Offload] = weakref.WeakKeyDictionary()


class Offload:
    """Keeps the idle blocks of a model on the host.

    An idle block's parameters hold its weights on the host, where updates find them (a ParamTable
    of them is one of CPU tensors). During its forward they point into one of two buffers on the
    device. Everything else (active blocks, embeddings, norms, head, buffers) is brought to the
    device. Any forward of the model works; inside of ``streaming`` blocks are copied ahead of use.

    Args:
        model: a model with transformer blocks.
        active: names of the blocks that stay on the device (``zorba.hf.find_blocks``); the others
            are idle.
        device: where the model computes; that of its first parameter by default.
        folder: for a file a block, mapped to memory: on a CPU, where the device's memory is the
            host's, there is no other way. On a GPU None means page-locked memory. The files are
            scratch: they change with the weights, and are removed by ``close``.

    Raises:
        ValueError: an unknown block, no blocks, weights that are shared between an idle block and
            the rest of the model, no folder on a CPU, or a model that is offloaded already.
    """

    def __init__(
        self,
        model: nn.Module,
        active: Collection[str],
        device: torch.device | str | None = None,
        folder: str | Path | None = None,
    ) -> None:
        if model in _offloads:
            raise ValueError("the model is offloaded already: use set_active, or close it first")
        self._model = model
        self._blocks = {block.name: block for block in find_blocks(model)}
        self._device = torch.device(device) if device else next(model.parameters()).device
        self._folder = None if folder is None else Path(folder)
        if self._folder is None and self._device.type == "cpu":
            raise ValueError(
                "on a CPU idle blocks wait in files: give folder=, on a disk and not in a file "
                "system that lives in memory"
            )
        self._host: dict[str, dict[str, Tensor]] = {}
        self._forwards: dict[str, ExitStack] = {}
        self._stream = BlockStream(self._device, {})
        # Checked before anything moves: a refusal leaves the model as it was.
        self._check(active)
        # Known from here on: what fails below is undone by close(), which needs to find it.
        _offloads[model] = self
        try:
            self.set_active(active)
            self._bring_rest()
        except BaseException:
            self.close()
            raise

    @staticmethod
    def of(model: nn.Module) -> Offload | None:
        """Returns the Offload of a model, or None."""
        return _offloads.get(model)

    @property
    def idle(self) -> tuple[str, ...]:
        """Names of the blocks on the host, in the order of the model."""
        return tuple(self._host)

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the blocks on the device."""
        return tuple(name for name in self._blocks if name not in self._host)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks."""
        return tuple(self._blocks.values())

    @property
    def buffer_bytes(self) -> int:
        """Device memory that the buffers take: twice the largest idle block."""
        return self._stream.nbytes

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Context in which no weight changes: blocks are fetched ahead, and kept between uses."""
        try:
            with self._stream.streaming():
                yield
        finally:
            # Ctrl-C in a forward may have come before the block pointed back by itself.
            for name in self._host:
                self._point(name, self._host[name])

    def set_active(self, active: Collection[str]) -> None:
        """Moves blocks between host and device, so that ``active`` are those on the device.

        ValueError: an unknown block, or weights shared with the rest; nothing was moved. OSError: a
        file could not be written; blocks moved before stay where they went.
        """
        self._check(active)
        wanted = set(active)
        if set(self.active) == wanted:
            return
        # The old buffers are freed before blocks arrive; the new ones fit the blocks idle then.
        self._stream = BlockStream(self._device, {})
        try:
            # Leaving ones first: arriving blocks need the memory that they free.
            for name in [name for name in self.active if name not in wanted]:
                self._leave(name)
            for name in [name for name in self.idle if name in wanted]:
                self._arrive(name)
        finally:
            self._host = {name: self._host[name] for name in self._blocks if name in self._host}
            self._stream = BlockStream(self._device, self._host)

    def close(self) -> None:
        """Brings all blocks to the device and removes the files. The model is as it was."""
        for name in self.idle:
            self._arrive(name)
        self._stream = BlockStream(self._device, {})
        _offloads.pop(self._model, None)

    def __enter__(self) -> Offload:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _check(self, active: Collection[str]) -> None:
        names = list(self._blocks)
        if unknown := sorted(set(active) - set(names)):
            raise ValueError(
                f"the model has no blocks named {', '.join(unknown[:5])}; it has {names[0]} to "
                f"{names[-1]}"
            )
        # A module that shares an idle block's weights would read them on the host.
        idle = [block for name, block in self._blocks.items() if name not in active]
        owner = {id(p): block.name for block in idle for p in block.module.parameters()}
        inside = {id(m): block.name for block in idle for m in block.module.modules()}
        for path, module in self._model.named_modules():
            for name, p in module._parameters.items():
                block_name = owner.get(id(p))
                if block_name is not None and inside.get(id(module)) != block_name:
                    raise ValueError(
                        f"block {block_name} shares weights with {path or 'the model'}.{name}: it "
                        "must stay active"
                    )

    def _bring_rest(self) -> None:
        # Active blocks, what is in no block, and all buffers. Through ``.data``: an optimizer that
        # was made before keeps its parameters.
        idle = {id(p) for name in self._host for p in self._blocks[name].module.parameters()}
        for p in self._model.parameters():
            if id(p) not in idle:
                p.data = _own(p.data, self._device)
        for module in self._model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self._device)

    def _leave(self, name: str) -> None:
        block = self._blocks[name]
        weights = {n: p.data for n, p in block.module.named_parameters()}
        if self._folder is None:  # from where a GPU takes them while it computes
            self._host[name] = {
                n: torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t)
                for n, t in weights.items()
            }
        else:
            self._host[name] = to_file(self._folder / f"{name}.bin", weights)
        self._point(name, self._host[name])
        # A forward of its own, not hooks: hooks of others (a placement's) must run inside of it.
        self._forwards[name] = ExitStack()
        forward = partial(self._forward, name, block.module.forward)
        self._forwards[name].enter_context(replaced_forward(block.module, forward))

    def _arrive(self, name: str) -> None:
        self._forwards.pop(name).close()
        for p in self._blocks[name].module.parameters():
            p.data = _own(p.data, self._device)
        del self._host[name]
        if self._folder is not None:
            (self._folder / f"{name}.bin").unlink(missing_ok=True)

    def _forward(self, name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
        with self._stream.use(name) as weights:
            try:
                self._point(name, weights)
                return original(*args, **kwargs)
            finally:
                self._point(name, self._host[name])

    def _point(self, name: str, weights: Mapping[str, Tensor]) -> None:
        for n, p in self._blocks[name].module.named_parameters():
            p.data = weights[n]


def _own(weights: Tensor, device: torch.device) -> Tensor:
    # On a CPU always a copy: tensors of a mapped file would keep the removed file on the disk.
    return weights.to(device, copy=device.type == "cpu")


def to_file(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Writes tensors to a new file, and returns CPU tensors that are mapped from there.

    The mapping is shared: writes to the tensors go to the file, and the system may drop their pages
    and read them again. They take no memory of the process's own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A new file, not the old one rewritten: another process may have that mapped.
    path.unlink(missing_ok=True)
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # Written, not only mapped: on a full disk a mapped page would end the process.
    with path.open("wb") as file:
        for tensor in kept.values():
            file.write(bytes_of(tensor).data)
            file.write(bytes(padded_bytes(tensor) - tensor.nbytes))
    mapped, offset = {}, 0
    for name, tensor in kept.items():
        if tensor.nbytes:  # nothing of no length can be mapped
            raw = np.memmap(path, np.uint8, "r+", offset, (tensor.nbytes,))
            tensor = torch.from_numpy(raw).view(tensor.dtype).view(tensor.shape)
        mapped[name] = tensor
        offset += padded_bytes(kept[name])
    return mapped
