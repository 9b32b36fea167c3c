"""The memory of a client: weights counted, the rest measured on three blocks of the model.

A client of three blocks does everything that one of the whole model does, at the same batch. So
what it takes beyond its weights is taken beyond the weights of the whole model, too.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zorba import machine
from zorba.apps.plan.measure import measure_client
from zorba.apps.plan.settings import PlanSettings
from zorba.blocks import find_blocks
from zorba.files import write_whole
from zorba.planning import MemoryModel, model_weights_memory
from zorba.tables import padded_bytes

Overhead = tuple[int, int]
"""Bytes that a client takes besides what is counted: with some blocks active, and with all."""

_VERSION = 2  # of what is measured; entries of others are left alone
_SOME = (False, True, False)  # a prefix, an active block, and an idle one behind it
_ALL = (True, True, True)  # no prefix, and no evaluation waits for a block
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Of the host's memory, for each parameter of an active and of an idle block: objects of Python,
# and the ends of pages. Read off clients of 3 and of 9 small blocks (docs/planning.md).
_OBJECTS = (35 << 10, 15 << 10)


def read_config(model: str) -> Any:
    """Returns the config of a causal language model: a folder, a config.json, or a hub name."""
    from transformers import AutoConfig

    path = Path(model)
    try:
        return AutoConfig.from_pretrained(str(path.parent if path.name == "config.json" else model))
    except (OSError, ValueError) as error:
        raise ValueError(f"{model} has no config of a model: {error}") from error


def make_model(config: Any, dtype: str, device: str = "cpu") -> nn.Module:
    """Returns a causal language model of random weights; on device "meta" it takes no memory."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.device(device):
        model: nn.Module = auto.from_config(config, dtype=getattr(torch, dtype))
    return model.eval().requires_grad_(False)


def memory_model(config: Any, settings: PlanSettings, overhead: Overhead) -> MemoryModel:
    """Returns weights, buffers of idle blocks and perturbed weights, counted, with an overhead."""
    model = make_model(config, settings.dtype, "meta")
    blocks = find_blocks(model)
    weights = model_weights_memory(model, idle=settings.idle)
    # A module's perturbed weights are made just before it runs, in scratch for the largest one.
    modules = [module for block in blocks for module in block.module.modules()]
    scratch = max(sum(map(padded_bytes, m.parameters(recurse=False))) for m in modules)
    on, off = _OBJECTS if settings.device == "cpu" else (0, 0)
    active = [block.nbytes + on * len(block.parameters) for block in blocks]
    # Masks save no memory where idle blocks stay: their fewer objects are no reason to trade.
    offloaded = [off * len(block.parameters) for block in blocks]
    idle = offloaded if settings.idle == "offload" else active
    outside = sum(p.nbytes for p in model.parameters()) - sum(block.nbytes for block in blocks)
    fixed, whole = weights.fixed + scratch + overhead[0], outside + scratch + overhead[1]
    return MemoryModel(active, idle, fixed, weights.block_names, whole + sum(active))


def calibrate(config: Any, settings: PlanSettings, say: Callable[[str], None]) -> Overhead:
    """Runs two clients of three blocks at the workload that is planned for, and ``say``s so.

    ``settings.calibration`` keeps the results, by machine, versions, workload and architecture.
    """
    small = _truncated(config)
    name = "cpu" if settings.device == "cpu" else torch.cuda.get_device_name(settings.device)
    described = machine.describe() | {"device": name}
    shape = {k: v for k, v in small.to_dict().items() if not k.startswith("_")}
    text = json.dumps([_VERSION, shape, settings.workload, described], default=str)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = settings.calibration
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if key not in known:
        say("calibrating: measuring two clients of three blocks")
        counted = memory_model(small, settings, (0, 0))
        with tempfile.TemporaryDirectory() as folder:
            make_model(small, settings.dtype).save_pretrained(folder)  # type: ignore[operator]
            seen = {mask: measure_client(folder, mask, settings) for mask in (_SOME, _ALL)}
        overhead = [max(seen[mask] - counted.bytes_of(mask), 0) for mask in seen]
        known[key] = {"machine": described, "workload": settings.workload, "overhead": overhead}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(known, indent=1))
    some, every = known[key]["overhead"]
    return some, every


def _truncated(config: Any) -> Any:
    """Returns the config with three blocks, of one that tells how many it has."""
    small = copy.deepcopy(config)
    depth = next((name for name in _DEPTHS if hasattr(small, name)), None)
    if depth is None:
        raise ValueError(f"the config of {config.model_type} does not tell its number of blocks")
    setattr(small, depth, len(_SOME))
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[: len(_SOME)]
    return small
