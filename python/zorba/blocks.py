"""Finds the transformer blocks of a Hugging Face model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from zorba_kernels.noise import canonical_name

_DEPTHS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
    "num_decoder_layers", "num_encoder_layers", "depth",
)  # fmt: skip
_STAGES = ("depths", "block_sizes")  # one depth for each stage
_MARK = "GradientCheckpointingLayer"  # transformers derives its blocks from this class

_Stack = tuple[str, nn.ModuleList]


@dataclass(frozen=True)
class Block:
    """One transformer block."""

    name: str  # its module's canonical name, for example ``model.layers.3``
    module: nn.Module
    parameters: tuple[str, ...]  # canonical names, tied ones under their first name

    @property
    def nbytes(self) -> int:
        """Bytes of all its parameters."""
        return sum(p.nbytes for p in self.module.parameters())


def find_blocks(model: nn.Module) -> list[Block]:
    """Returns the transformer blocks of a model, in the order of its modules.

    Blocks are the members of the ``ModuleList``s that show two of three signs: their length is a
    depth that the model's config names, or a config within it; transformers marks their members for
    checkpointing; they hold a tenth of all parameters. Where no list shows two, a fitting length is
    enough, and without a config the tenth. So an encoder-decoder has two lists of blocks, as has a
    language model with a vision tower; ALBERT's blocks are its few groups, however often called.
    What a block contains (experts, say) is no block of its own; stages are taken apart.

    Raises:
        ValueError: no such list, blocks that share parameters, or blocks that are spread over
            several lists.
    """
    stacks = _stacks(model)
    if not stacks:
        raise ValueError(
            f"no transformer blocks found in {name_of(model)}: it has no ModuleList of equally "
            "built modules with a substantial part of the parameters. Fine-tune it as a whole"
        )
    # named_parameters tells a tied parameter once, under its first name: so do blocks, or a mask
    # would count it twice.
    names = {id(p): canonical_name(n) for n, p in model.named_parameters()}
    blocks = [
        Block(
            canonical_name(f"{stack_name}.{i}" if stack_name else str(i)),
            module,
            tuple(dict.fromkeys(names[id(p)] for p in module.parameters())),
        )
        for stack_name, stack in stacks
        for i, module in enumerate(stack)
    ]
    _refuse_shared_parameters(model, blocks)
    return blocks


def _stacks(model: nn.Module) -> list[_Stack]:
    """The lists of blocks, by the first rule that finds some."""
    depths, stages = _depths(model)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and _numel(module)
        and not any(isinstance(member, nn.ModuleList) for member in module)
        and not _is_stages(module, stages)
    ]
    alike: Counter[frozenset[type]] = Counter()  # elements of lists of the same classes: stages
    for _, stack in lists:
        alike[_classes(stack)] += _numel(stack)
    total = _numel(model)
    # One sign alone may be an accident: norms are as many as layers, a vision stem is marked, a
    # list of experts holds most parameters. No tested model shows two by accident.
    deep = [item for item in lists if len(item[1]) in depths]
    marked = [item for item in lists if _is_marked(item[1])]
    large = [item for item in lists if 10 * alike[_classes(item[1])] >= total]
    found = [item for item in lists if sum(item in some for some in (deep, marked, large)) >= 2]
    # Models of no config, or with a config that is not transformers', show fewer.
    found = found or deep or [item for item in large if len(_classes(item[1])) == 1]
    # Experts of a block are a list in a member of a list: named_modules tells the outer one first.
    kept: list[_Stack] = []
    for name, stack in found:
        if not any(not outer or name.startswith(outer + ".") for outer, _ in kept):
            kept.append((name, stack))
    if not any(_is_marked(stack) for _, stack in kept):
        _refuse_parallel_lists(model, kept)
    return kept


def _configs(model: nn.Module) -> Iterator[Any]:
    """The model's config, also inside wrappers, and those nested in it."""
    # Wrappers (DDP, PEFT) may have none of their own: the first one inside is the model's.
    found = next((m.config for m in model.modules() if hasattr(m, "config")), None)
    waiting, seen = [found], set()
    while waiting:
        config = waiting.pop(0)
        if config is not None and id(config) not in seen:
            seen.add(id(config))
            yield config
            values = getattr(config, "__dict__", {}).values()
            waiting += [value for value in values if hasattr(value, "model_type")]


def _depths(model: nn.Module) -> tuple[set[int], list[tuple[int, ...]]]:
    """Lengths that lists of blocks may have, and the depths of each stage where there are some."""
    configs = list(_configs(model))
    stages = [tuple(getattr(c, n)) for c in configs for n in _STAGES if getattr(c, n, None)]
    depths = {depth for stage in stages for depth in stage}
    for config in configs:
        values = (getattr(config, name, None) for name in _DEPTHS)
        depths |= {value for value in values if isinstance(value, int)}
    return depths, stages


def _is_stages(stack: nn.ModuleList, stages: list[tuple[int, ...]]) -> bool:
    # Swin's list of stages is as long as ``depths``; its blocks are one level below.
    lengths = [{len(m) for m in s.modules() if isinstance(m, nn.ModuleList)} for s in stack]
    return any(
        len(depths) == len(stack) and all(d in n for d, n in zip(depths, lengths, strict=True))
        for depths in stages
    )


def _is_marked(stack: nn.ModuleList) -> bool:
    return all(_MARK in {c.__name__ for c in type(member).__mro__} for member in stack)


def _classes(stack: nn.ModuleList) -> frozenset[type]:
    return frozenset(type(member) for member in stack)


def _refuse_parallel_lists(model: nn.Module, stacks: list[_Stack]) -> None:
    # XLM keeps the attentions of all blocks in one list, their feed-forwards in another: each list
    # looks like blocks, and a mask would move half of one.
    places: dict[tuple[str, int], list[str]] = {}
    for name, stack in stacks:
        parent = name.rpartition(".")[0]
        if not isinstance(model.get_submodule(parent), nn.ModuleList):
            places.setdefault((parent, len(stack)), []).append(name)
    for together in places.values():
        if len(together) > 1:
            raise ValueError(
                f"{name_of(model)} has lists of one length side by side "
                f"({', '.join(together)}): its transformer blocks are spread over them, or cannot "
                "be told. Fine-tune it as a whole"
            )


def _refuse_shared_parameters(model: nn.Module, blocks: list[Block]) -> None:
    owner: dict[str, Block] = {}
    for block in blocks:
        for name in block.parameters:
            first = owner.setdefault(name, block)
            if first is not block:
                raise ValueError(
                    f"{name_of(model)} shares parameters between its transformer blocks: {name!r} "
                    f"belongs to {first.name} and to {block.name}, so that a mask cannot move one "
                    "without the other. Fine-tune it as a whole"
                )


def name_of(model: nn.Module) -> str:
    """Returns class and model type, for errors."""
    kind = next((getattr(config, "model_type", "") for config in _configs(model)), "")
    return type(model).__name__ + (f" (model type {kind})" if kind else "")


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
