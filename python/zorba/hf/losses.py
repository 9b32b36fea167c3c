"""Losses of examples, taken from the output of a model that returned one loss for the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from zorba.optim.own import repeated

_IGNORED = -100  # as a label: a token, or an example, that has no loss

# A sum in another order is off by 1e-6. An auxiliary loss that is missed (a router's: 0.001 times
# the number of experts) is larger than this, and so is a shift by one token.
_TOLERANCE = 1e-4
_ROUNDINGS = 4  # of losses that a model computes in 16 bits, by which they may be off as well


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of a step, whose forwards run one after the other."""

    parts: tuple[dict[str, Any], ...]
    times: int = 1  # how often each example is there

    def repeat(self, times: int) -> MicroBatches | None:
        """Returns a batch with each example several times; None where this cannot be made."""
        if len(self.parts) > 1:
            return None  # they are apart to save memory, which this would take
        inputs = {name: repeated(value, times) for name, value in self.parts[0].items()}
        # A tensor of another number of rows (patches of several pictures) belongs to examples in a
        # way that is not known here.
        rows = {len(v) for v in self.parts[0].values() if isinstance(v, Tensor) and v.ndim}
        if len(rows) > 1 or any(value is None for value in inputs.values()):
            return None
        return MicroBatches((inputs,), times * self.times)


class ExampleLosses:
    """Takes the losses of examples from outputs of a transformers model.

    Their mean is the loss that the model (or Trainer, with label smoothing) made of the same
    output: classification, regression, labels of several classes, language models, token
    classification, encoder-decoders, multiple choice and question answering. That is proven on the
    first output whose loss is finite, as models may add a loss of their own.

    Args:
        model: whose class and config tell the kind of loss.
        smoothing: of labels, by Trainer.
    """

    def __init__(self, model: nn.Module, smoothing: float = 0.0) -> None:
        inside: Any = getattr(model, "get_base_model", None)  # of a wrapper of PEFT
        base: Any = model if inside is None else inside()
        self._name, self._config = type(base).__name__, getattr(base, "config", None)
        self._smoothing = smoothing
        causal = self._name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        # Whether logits are of the next token; the name tells, but for models of text and pictures.
        self._shifts = [causal, not causal]
        self._proven = False

    def __call__(
        self, outputs: Any, inputs: Mapping[str, Any], loss: Tensor, items: Tensor | int | None
    ) -> Tensor:
        """Returns the loss of each example, float32 [rows]; their mean is ``loss``.

        Args:
            outputs: of the model.
            inputs: of the model, with labels (or positions of an answer).
            loss: that was made of the outputs, [].
            items: labels in the whole batch, by which models divide that are given their number.

        Raises:
            ValueError: the losses of these outputs are not known, or their mean is not ``loss``.
        """
        found = []
        for shifted in self._shifts:
            sums, count = self._sums(outputs, inputs, shifted)
            # Many models take the number of items and yet divide by the labels of the micro-batch.
            for divisor in (count, count if items is None else torch.as_tensor(items)):
                shares = sums / divisor.to(sums.device)
                found.append((abs(float(shares.sum()) - float(loss)), shifted, shares))
        fits = [one for one in found if one[0] <= self._limit(outputs, loss)]
        if not self._proven and math.isfinite(loss):
            if not fits:
                mean = float(found[0][2].sum())
                raise self._unknown(
                    f"these have the mean {mean:.6g}, and its loss is {float(loss):.6g}"
                )
            self._proven, self._shifts = True, [fits[0][1]]
        # Where the loss is not finite, any of them shows that; the step is skipped.
        shares = min(fits or found, key=lambda one: one[0])[2]
        return shares * len(shares)

    def _sums(
        self, outputs: Any, inputs: Mapping[str, Any], shifted: bool
    ) -> tuple[Tensor, Tensor]:
        """Sums over the labels of each example, float32 [rows], and the labels of all, []."""
        if not isinstance(outputs, Mapping):
            raise self._unknown(f"its output is a {type(outputs).__name__}, which has no names")
        if "start_logits" in outputs and "start_positions" in inputs:
            (start, starts), (end, ends) = (self._position(outputs, inputs, n) for n in _ENDS)
            # Each is a mean over the answers that are there: brought to the number of the first.
            return (start + end * (starts / ends)) / 2, starts
        logits, labels = outputs.get("logits"), inputs.get("labels")
        if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
            raise self._unknown(f"it has {', '.join(outputs)} of {', '.join(inputs)}")
        logits, labels = logits.float(), labels.to(logits.device)
        rows = torch.tensor(len(logits))
        if logits.ndim == 2 and self._smoothing == 0.0:
            problem = getattr(self._config, "problem_type", None)
            if "MultipleChoice" in self._name:
                problem = None  # the config's is of classifiers
            if problem == "regression":
                return mse_loss(logits, labels.reshape_as(logits), reduction="none").mean(1), rows
            if problem == "multi_label_classification":
                return binary_cross_entropy_with_logits(
                    logits, labels.float(), reduction="none"
                ).mean(1), rows
        if logits.ndim == 2 and labels.numel() == len(logits):
            logits, labels = logits[:, None], labels.reshape(-1, 1)
        elif logits.ndim == 3 and labels.ndim == 2:
            # Virtual tokens of a soft prompt come first, and have no labels.
            ahead = logits.shape[1] - labels.shape[1]
            labels = nn.functional.pad(labels, (ahead, 0), value=_IGNORED)
            if shifted:
                logits, labels = logits[:, :-1], labels[:, 1:]
        else:
            raise self._unknown(
                f"it has logits {tuple(logits.shape)} and labels {tuple(labels.shape)}"
            )
        losses = cross_entropy(
            logits.flatten(0, 1),
            labels.flatten().long(),
            ignore_index=_IGNORED,
            reduction="none",
            label_smoothing=self._smoothing,
        )
        return losses.view(labels.shape).sum(1), (labels != _IGNORED).sum()

    def _position(self, outputs: Any, inputs: Mapping[str, Any], end: str) -> tuple[Tensor, Tensor]:
        """Losses of one end of the answers, [rows], and how many answers there are, []."""
        logits = outputs[f"{end}_logits"].float()
        positions = inputs[f"{end}_positions"].reshape(-1).to(logits.device)
        outside = logits.shape[1]  # where an answer is that was cut off
        positions = positions.clamp(0, outside)
        losses = cross_entropy(logits, positions, ignore_index=outside, reduction="none")
        return losses, (positions != outside).sum()

    def _limit(self, outputs: Any, loss: Tensor) -> float:
        kinds = [loss.dtype]
        if self._smoothing and isinstance(outputs, Mapping) and "logits" in outputs:
            kinds.append(outputs["logits"].dtype)  # Trainer smooths in the dtype of the logits
        rounding = _ROUNDINGS * max(torch.finfo(kind).eps for kind in kinds)
        return max(_TOLERANCE, rounding) * abs(float(loss)) + 1e-6

    def _unknown(self, why: str) -> ValueError:
        return ValueError(
            f"own directions need a loss for each example, which cannot be taken from the output "
            f"of {self._name}: {why}. Give ZOTrainer a compute_loss_func that returns the losses "
            "of examples, a tensor [examples], or set zo_directions='shared'"
        )


_ENDS = ("start", "end")
