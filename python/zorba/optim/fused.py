"""The fused placement: noise is added to what layers compute; perturbed weights exist nowhere.

A rank-one noise ``c u v^T`` of a weight W changes ``W x`` by ``c (x . v) u``, and one of a vector
is a vector. So each row of a batch may have noise of its own, and an evaluation
neither reads nor writes weights beyond what its forward does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import zorba_kernels as zk
from zorba.forward import replaced_forward
from zorba.optim.options import active_table
from zorba.optim.owners import Owner, find_owners
from zorba.optim.placement import ModulePlacement
from zorba.optim.terms import NoiseTerms, RowTerms
from zorba.optim.thread import deferred_interrupts

# Samples and scale of each row, one pair a term.
_Rows = list[tuple[int, Tensor, Tensor]]

# Modules that take hidden states [rows, tokens, n] and run inner layers on [rows * tokens, n], one
# row after the other, as their source says. The shape alone would not: an expert's may be in any
# order.
_FLATTENING = {("transformers.models.opt.modeling_opt", "OPTDecoderLayer")}


class FusedPlacement(ModulePlacement):
    """Rank-one noise in the forwards of linear layers and norms; see ``unfusable``.

    No memory beyond a vector a row for each norm, and weights are written by ``update`` alone.
    Noise may differ by row of the batch (``RowTerms``): then every layer's first dimension must be
    that of the batch, and one that sees other rows raises ValueError; but for those in
    ``_FLATTENING``. Noise that all rows share (``NoiseTerms``) has no such limit.
    """

    def __init__(self, model: nn.Module, table: zk.ParamTable, distribution: str) -> None:
        if distribution != "rank1":
            raise ValueError(
                f"placement 'fused' makes noise of distribution 'rank1', not {distribution!r}"
            )
        super().__init__(model, table, distribution)
        self._terms: NoiseTerms | RowTerms = NoiseTerms.none(table.num_groups)
        self._rows: int | None = None  # of the batch, as the layers of this forward have seen it
        self._start = 0  # number of the first of them, where a batch runs in parts
        self._flattened: torch.Size | None = None  # rows and tokens, in a module of _FLATTENING
        self._made: dict[tuple[int, int, torch.device], _Rows] = {}
        self._active: dict[int, bool] = {}  # groups that the noise moves, as far as was asked
        self._proven: set[nn.Module] = set()  # that broadcast a vector a row
        self._find_owners()

    def _find_owners(self) -> None:
        self.owners = find_owners(self._model, self.table)
        self._entries = {entry.name: entry for entry in self.table.entries}
        self._names = {module: name for name, module in self._model.named_modules()}
        self._flattening = [module for module in self._names if _kind(module) in _FLATTENING]

    def hold(self, names: Collection[str]) -> None:
        """Refuses: there are no perturbed weights that could be read outside of a forward."""
        raise ValueError(
            f"{', '.join(sorted(names)[:5])}: read outside of the forward of their module, where "
            "placement 'fused' cannot add noise; freeze them, or use placement='scratch'"
        )

    @deferred_interrupts()
    def _enter(self) -> None:
        register = self._hooks.enter_context
        for module in self._flattening:
            register(module.register_forward_pre_hook(self._flatten, with_kwargs=True))
            register(module.register_forward_hook(self._unflatten, always_call=True))
        for owner in self.owners:
            module = owner.module
            if _product(module) is None:
                forward = partial(self._vectors, owner, module.forward)
                register(replaced_forward(module, forward))
            else:
                # In front of other hooks: they must find the output of perturbed weights.
                hook = partial(self._after_product, owner)
                handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
                self._hooks.callback(handle.remove)

    def _show_weights(self) -> None:
        for owner in self.owners:
            if owner.depth:
                owner.point_to(owner.weights)
                owner.depth = 0

    def move_to(self, terms: NoiseTerms | RowTerms) -> None:
        """See ``Placement.move_to``; costs nothing until a forward runs."""
        self._show_weights()
        self._terms = terms
        self._begin_rows(0)

    def rows_from(self, start: int) -> None:
        """Is told, within an evaluation, that the next forward is of the rows from ``start`` on.

        ValueError: the forwards before it had another number of rows.
        """
        if start:
            self.check_rows(start)
        self._begin_rows(start)

    def _begin_rows(self, start: int) -> None:
        self._rows, self._start, self._flattened = None, start, None
        self._made.clear()
        self._active.clear()

    def check_rows(self, losses: int) -> None:
        """Raises ValueError unless the layers have seen a row for each loss of an evaluation."""
        if self._rows is not None and self._start + self._rows != losses:
            raise ValueError(
                f"the closure returned {losses} losses, but the model's layers saw "
                f"{self._start + self._rows} rows: with placement='fused' and directions='own' "
                "each loss must be of one row (not of several choices, for example); "
                "placement='scratch' has no such need"
            )

    def park(self) -> Any:
        """See ``Placement.park``."""
        return self._terms, self._rows, self._start, self._flattened

    def resume(self, parked: Any) -> None:
        """See ``Placement.resume``."""
        self._terms, self._rows, self._start, self._flattened = parked
        self._made.clear()
        self._active.clear()

    def _flatten(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        known = isinstance(hidden, Tensor) and hidden.ndim == 3
        self._flattened = hidden.shape[:2] if known else None

    def _unflatten(self, *hook_arguments: Any) -> None:
        self._flattened = None

    def _by_row(self, x: Tensor) -> Tensor:
        """What a layer sees with the rows of the batch in front; itself where it has them."""
        shape = self._flattened
        flat = shape is not None and x.ndim == 2 and len(x) == shape.numel()
        return x.reshape(*shape, -1) if shape is not None and flat else x

    def _after_product(
        self, owner: Owner, module: nn.Module, args: Any, kwargs: Any, y: Tensor
    ) -> Tensor:
        """Adds the noise of a linear layer's weight and bias to its output."""
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        # A head whose logits are computed in part (``narrow_logits``) has other positions.
        if y.shape[:-1] != x.shape[:-1]:
            raise self._refused(module, f"made {tuple(y.shape)} of {tuple(x.shape)}")
        y = y.contiguous()  # so that what is written to a view of it is seen
        x = self._by_row(x)
        # Noise that all rows share: whatever they are, they are the tokens of one.
        shape = (1, -1) if self._shared else x.shape[:-1]
        for name, weight in zip(owner.parameter_names, owner.weights, strict=True):
            matrix = weight.ndim > 1
            for seed, samples, scale in self._noise(owner, name, x):
                zk.perturb_(
                    y.view(*shape, y.shape[-1]), x.reshape(*shape, x.shape[-1]) if matrix else None,
                    seed=seed, stream=self._entries[name].stream, samples=samples, scale=scale,
                    transposed=matrix and _product(module) == "transposed",
                )  # fmt: skip
        return y

    def _vectors(
        self, owner: Owner, forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Runs a norm with a weight (and bias) for each row."""
        module, seen = owner.module, x
        x = self._by_row(x)
        shown = []
        for name, weight in zip(owner.parameter_names, owner.weights, strict=True):
            vectors = weight.unsqueeze(0)
            for number, (seed, samples, scale) in enumerate(self._noise(owner, name, x)):
                if number == 0:
                    vectors = weight.repeat(len(samples), 1)  # a copy even for one row
                zk.perturb_(
                    vectors, seed=seed, stream=self._entries[name].stream, samples=samples,
                    scale=scale,
                )  # fmt: skip
            shown.append(vectors)
        if all(len(vectors) == 1 for vectors in shown):
            return self._with(owner, [v[0] for v in shown], forward, seen, *args, **kwargs)
        # [rows, 1, ..., n], so that they meet x [rows, ..., n].
        spread = [v.view(len(v), *(1,) * (x.ndim - 2), -1) for v in shown]
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            plain = _normalised(module, x)
            for name, vectors in zip(owner.local_names, spread, strict=True):
                plain = plain * vectors if name == "weight" else plain + vectors
            return plain.to(x.dtype).reshape(seen.shape)
        y = self._with(owner, spread, forward, x, *args, **kwargs)
        if module not in self._proven:
            last = self._with(owner, [v[-1] for v in shown], forward, x[-1:], *args, **kwargs)
            if y.shape != x.shape or not torch.allclose(y[-1:].float(), last.float(), rtol=1e-3):
                raise self._refused(module, "does not compute row by row")
            self._proven.add(module)
        return y.reshape(seen.shape) if seen is not x else y

    def _with(
        self, owner: Owner, tensors: list[Tensor], forward: Callable[..., Any], *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Runs a forward whose parameters read other tensors."""
        owner.depth = 1  # noted first: ``_leave`` undoes what an interrupt left
        owner.point_to(tensors)
        try:
            return forward(*args, **kwargs)
        finally:
            owner.point_to(owner.weights)
            owner.depth = 0

    @property
    def _shared(self) -> bool:
        return isinstance(self._terms, NoiseTerms)

    def _noise(self, owner: Owner, name: str, x: Tensor) -> _Rows:
        """The terms of a parameter's noise for the rows of a layer's input or output."""
        group, terms = self._entries[name].group, self._terms
        # Once a group, not once a layer: that a tensor is not 0 takes longer than its noise.
        if group not in self._active:
            self._active[group] = terms.active(group)
        if not self._active[group]:
            return []
        rows = 1 if isinstance(terms, NoiseTerms) else x.shape[0]
        key = (group, rows, x.device)
        if isinstance(terms, RowTerms):
            # The first layer of an evaluation says how many there are; all others must agree.
            self._rows = rows if self._rows is None else self._rows
            if x.ndim < 2 or rows != self._rows:
                raise self._refused(
                    owner.module, f"saw rows {tuple(x.shape)} of a batch of {self._rows}"
                )
        if key not in self._made:
            self._made[key] = [
                (seed, samples.to(x.device), scale.to(x.device))
                for seed, samples, scale in terms.by_row(group, rows, self._start)
            ]
        return self._made[key]

    def _refused(self, module: nn.Module, why: str) -> ValueError:
        return ValueError(
            f"{self._names.get(module, '?')!r} ({type(module).__name__}) {why}, so its noise "
            "cannot be made by row: freeze its parameters (requires_grad=False), or use "
            "placement='scratch'"
        )


def unfusable(model: nn.Module, table: zk.ParamTable) -> dict[str, str]:
    """Returns the parameters in whose modules the noise cannot be made, and these modules' types.

    It can be made in linear layers (nn.Linear, transformers' Conv1D; LoRA's are such) and in
    modules whose own parameters are vectors of the last dimension, as norms. Not in embeddings,
    convolutions, or modules that use their weights in another way.
    """
    found: dict[str, str] = {}
    for owner in find_owners(model, table):
        vectors = all(weight.ndim == 1 for weight in owner.weights)
        leaf = next(owner.module.children(), None) is None
        if _product(owner.module) is None and not (vectors and leaf):
            found |= dict.fromkeys(owner.names, type(owner.module).__name__)
    return found


def fusable(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Returns those parameters in whose modules noise can be made, and names the others."""
    left = unfusable(model, active_table(model, dict.fromkeys(parameters, 0)))
    kept = {name: p for name, p in parameters.items() if name not in left}
    if left:
        kinds = ", ".join(f"{name} ({kind})" for name, kind in sorted(left.items())[:5])
        text = (
            f"placement='fused' cannot make noise in {kinds}{' and more' if len(left) > 5 else ''}:"
            " these parameters stay as they are; placement='scratch' trains them"
        )
        if not kept:
            raise ValueError(text)
        warnings.warn(text, stacklevel=4)
    return kept


def _kind(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def _product(module: nn.Module) -> str | None:
    """How a module multiplies by its weight: "plain", "transposed", or None: it does not."""
    # By the forward, not by the class: one that overrides it may do anything.
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return "plain"
    if _kind(module) == ("transformers.pytorch_utils", "Conv1D"):
        return "transposed"
    return None


def _normalised(module: nn.LayerNorm | nn.RMSNorm, x: Tensor) -> Tensor:
    shape = module.normalized_shape
    if isinstance(module, nn.LayerNorm):
        return nn.functional.layer_norm(x, shape, eps=module.eps)
    return nn.functional.rms_norm(x, shape, eps=module.eps)
