"""What a step takes besides weights, measured on three blocks of the model and kept in a file."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zorba import machine
from zorba.apps.plan.footprint import Footprint, footprint_of, make_model
from zorba.apps.plan.measure import measure_client, own_memory, run_rounds
from zorba.apps.plan.workload import Workload
from zorba.files import write_whole
from zorba.planning.memory import IdlePolicy

_SCHEMA = 1
_BLOCKS = 3
_MASK = (False, True, False)  # a prefix, an active block, and an idle one behind it
# (batch, length, perturbations): enough to tell apart what grows with tokens, with the square of
# the length, and with the evaluations that are under way at a time.
_SHAPES = ((2, 32, 1), (2, 32, 3), (6, 32, 1), (2, 96, 1), (2, 96, 3))
# In the process: long enough for activations to count, short enough to take seconds.
_PROCESS_SHAPE = (4, 64, 1)


@dataclass(frozen=True)
class Activations:
    """Most bytes that a step allocates besides scratch, under one policy for idle blocks.

    Attributes:
        stream: of an evaluation that waits, bytes a token.
        stream_square: the same, bytes a token and position of its sequence.
        block: of the running block and what is kept for all evaluations, bytes a token.
        block_square: the same, bytes a token and position.
        head: of the logits of a text's loss, bytes a token; 0 for a loss of label words.
    """

    stream: float
    stream_square: float
    block: float
    block_square: float
    head: float

    def peak(self, workload: Workload) -> int:
        """Returns the bytes of a step. Evaluations that wait hold their streams meanwhile."""
        tokens, square = workload.tokens, workload.tokens * workload.length
        waiting = workload.evaluations if workload.idle == "offload" else 1
        streams = waiting * (self.stream * tokens + self.stream_square * square)
        running = self.block * tokens + self.block_square * square
        if workload.loss == "text":
            running = max(running, self.head * tokens)
        return round(streams + running)


@dataclass(frozen=True)
class Calibration:
    """What a machine adds to the weights of a model.

    Attributes:
        machine: description, see ``zorba.machine.describe``.
        context: bytes that process and libraries take besides tensors, once they run.
        activations: of a step, by policy and loss: ``"offload label-words"``, ...
    """

    machine: dict[str, Any]
    context: int
    activations: dict[str, Activations]

    def of(self, workload: Workload) -> Activations:
        """Returns the activations of a workload's kind."""
        return self.activations[_key(workload)]


def calibrate(
    config: Any,
    dtype: str,
    cache: str | Path | None = None,
    device: str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> Calibration:
    """Measures what a step takes besides weights; takes a minute, or no time where it was done.

    Runs steps of a model of three blocks and random weights, under a count of allocations, and
    fits what grows with what. Then runs one in a process of its own: what that takes beyond its
    tensors is the context.

    Args:
        config: of the model.
        dtype: of weights and forward.
        cache: JSON file of calibrations; None does not keep them. Entries of another machine,
            other versions or another architecture are left alone.
        device: "cpu" or "cuda".
        say: is told what happens.
    """
    described = {**machine.describe(), "device": _device_name(device)}
    key = _cache_key(config, dtype, described)
    path = None if cache is None else Path(cache)
    known = _read(path)
    if key in known:
        return _from_record(known[key])
    small = _truncated(config)
    activations: dict[str, Activations] = {}
    idle: IdlePolicy
    for idle in ("resident", "offload"):
        say(f"calibrating: activations, idle blocks {idle}")
        model: Any = make_model(small, dtype)
        with ExitStack() as stack:
            if idle == "offload":
                _offload(model, stack, device)
            else:
                own_memory(model, device)
            activations |= _measured(model, footprint_of(small, dtype), idle, device)
        del model
    say("calibrating: what a process takes besides")
    context = _context(small, dtype, activations, device)
    result = Calibration(described, context, activations)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        known[key] = asdict(result)
        text = json.dumps({"schema": _SCHEMA, "calibrations": known}, indent=1)
        write_whole(path, text)
    return result


def _measured(
    model: Any, footprint: Footprint, idle: IdlePolicy, device: str
) -> dict[str, Activations]:
    scratch = footprint.scratch[_MASK.index(True)]

    def peak(workload: Workload) -> int:
        def call() -> None:
            with ExitStack() as stack:
                run_rounds(model, _MASK, workload, stack, rounds=2)

        return machine.peak_bytes(call, device) - scratch

    found: dict[str, Activations] = {}
    workloads = [
        Workload(batch, length, p, "central", "label-words", footprint.dtype, idle)
        for batch, length, p in (_SHAPES if idle == "offload" else _SHAPES[::2] + _SHAPES[3:4])
    ]
    fit = _fit(workloads, [peak(w) for w in workloads])
    found[_key(workloads[0])] = fit
    batch, length, p = _SHAPES[0]
    text = Workload(batch, length, p, "central", "text", footprint.dtype, idle)
    evaluations = text.evaluations if idle == "offload" else 1
    head = peak(text) / text.tokens - evaluations * (fit.stream + fit.stream_square * text.length)
    found[_key(text)] = Activations(
        fit.stream, fit.stream_square, fit.block, fit.block_square, max(head, 0.0)
    )
    return found


def _fit(workloads: Sequence[Workload], peaks: Sequence[int]) -> Activations:
    """Least squares of what the peaks grow with; nothing shrinks them."""
    from scipy.optimize import nnls

    rows = []
    for w in workloads:
        waiting = w.evaluations if w.idle == "offload" else 0
        square = w.tokens * w.length
        rows.append([waiting * w.tokens, waiting * square, w.tokens, square])
    scale = 1 / np.array(peaks, dtype=np.float64)  # relative errors count
    solved, _ = nnls(np.array(rows, dtype=np.float64) * scale[:, None], np.ones(len(rows)))
    stream, stream_square, block, block_square = solved.tolist()
    return Activations(stream, stream_square, block, block_square, 0.0)


def _context(small: Any, dtype: str, activations: dict[str, Activations], device: str) -> int:
    """Bytes that a client of the small model takes beyond what is predicted for its tensors."""
    if device != "cpu":
        return 0  # torch's count of device memory has nothing but tensors and its own workspaces
    batch, length, p = _PROCESS_SHAPE
    workload = Workload(batch, length, p, "central", "label-words", dtype, "resident")
    footprint = footprint_of(small, dtype)
    with tempfile.TemporaryDirectory() as folder:
        make_model(small, dtype).save_pretrained(folder)  # type: ignore[operator]
        above = measure_client(folder, _MASK, workload).above
    expected = footprint.total + footprint.scratch[_MASK.index(True)]
    return max(above - expected - activations[_key(workload)].peak(workload), 0)


def _offload(model: Any, stack: ExitStack, device: str) -> None:
    from zorba.hf import find_blocks
    from zorba.offload import Offload

    active = [b.name for b, on in zip(find_blocks(model), _MASK, strict=True) if on]
    folder = stack.enter_context(tempfile.TemporaryDirectory()) if device == "cpu" else None
    stack.enter_context(Offload(model, active, device, folder))


def _truncated(config: Any) -> Any:
    """The config with three blocks.

    Raises:
        ValueError: it does not say how many it has.
    """
    small = copy.deepcopy(config)
    depths = [
        n for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if hasattr(small, n)
    ]
    if not depths:
        raise ValueError(f"the config of {config.model_type} does not tell its number of blocks")
    setattr(small, depths[0], _BLOCKS)
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:_BLOCKS]
    return small


def _key(workload: Workload) -> str:
    return f"{workload.idle} {workload.loss}"


def _device_name(device: str) -> str:
    import torch

    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device)


def _cache_key(config: Any, dtype: str, described: dict[str, Any]) -> str:
    """A hash of what the measured bytes depend on; the number of blocks is no part of it."""
    small = {k: v for k, v in _truncated(config).to_dict().items() if not k.startswith("_")}
    kept = ("cpu", "threads", "device", "torch", "transformers", "cpu_isas")
    text = json.dumps([_SCHEMA, small, dtype, {k: described[k] for k in kept}], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(path: Path | None) -> dict[str, Any]:
    if path is None or not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
        known: dict[str, Any] = record["calibrations"] if record["schema"] == _SCHEMA else {}
    except (ValueError, KeyError, TypeError):
        return {}
    return known


def _from_record(record: dict[str, Any]) -> Calibration:
    parts = {name: Activations(**part) for name, part in record["activations"].items()}
    return Calibration(record["machine"], record["context"], parts)
