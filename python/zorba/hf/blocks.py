"""Finds the transformer blocks of a Hugging Face model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from zorba_kernels.noise import canonical_name

_DEPTHS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
)


@dataclass(frozen=True)
class Block:
    """One transformer block.

    Attributes:
        name: its module's canonical name, for example ``model.layers.3``.
        module: the module itself.
        parameters: canonical names of its parameters, tied ones under their first name.
    """

    name: str
    module: nn.Module
    parameters: tuple[str, ...]

    @property
    def numel(self) -> int:
        """Elements of all its parameters."""
        return sum(p.numel() for p in self.module.parameters())

    @property
    def nbytes(self) -> int:
        """Bytes of all its parameters."""
        return sum(p.numel() * p.element_size() for p in self.module.parameters())


def find_blocks(model: nn.Module) -> list[Block]:
    """Returns the transformer blocks of a model, in the order of its modules.

    Blocks are the members of the outermost ``ModuleList``s of equally built modules whose length
    is a depth that the model's config names (an encoder-decoder has two such lists); where there
    is no config, or none fits, of those that hold at least a tenth of all parameters.

    Raises:
        ValueError: no such list.
    """
    lists = _stacks(model)
    config = getattr(model, "config", None)
    depths = {getattr(config, name, None) for name in _DEPTHS} - {None}
    chosen = [item for item in lists if len(item[1]) in depths]
    if not chosen:
        total = sum(p.numel() for p in model.parameters())
        chosen = [(name, stack) for name, stack in lists if 10 * _numel(stack) >= total]
    if not chosen:
        raise ValueError(
            f"no transformer blocks found in {type(model).__name__}: it has no ModuleList of "
            "equally built modules with a substantial part of the parameters"
        )
    names = {id(p): canonical_name(n) for n, p in model.named_parameters()}
    return [
        Block(
            canonical_name(f"{stack_name}.{i}" if stack_name else str(i)),
            module,
            tuple(dict.fromkeys(names[id(p)] for p in module.parameters())),
        )
        for stack_name, stack in chosen
        for i, module in enumerate(stack)
    ]


def _stacks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Outermost ModuleLists of modules of one class, with parameters."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or not _numel(module):
            continue
        if any(not outer or name.startswith(outer + ".") for outer, _ in found):
            continue
        if len({type(member) for member in module}) == 1:
            found.append((name, module))
    return found


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
