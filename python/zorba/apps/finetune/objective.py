"""What is minimised: the loss of label words, or of the text itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zorba.apps.finetune.data import Row, fields_of
from zorba.hf.label_words import LabelWordLoss


@dataclass(frozen=True)
class Score:
    """Of a whole data set.

    Attributes:
        loss: mean over rows (label words) or predicted tokens (text).
        accuracy: share of rows whose right label word scores best; None for text.
    """

    loss: float
    accuracy: float | None


class Objective(ABC):
    """Loss of a batch of rows, and score of a data set."""

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> Any:
        """Returns a batch on the model's device."""

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """Returns the mean loss of a batch: float32 []."""

    @abstractmethod
    def losses(self, batch: Any) -> Tensor:
        """Returns the loss of each row of a batch, whatever the others are: float32 [rows]."""

    @abstractmethod
    def score(self, rows: Sequence[Row], batch_size: int) -> Score:
        """Returns the score of a data set."""


class LabelWords(Objective):
    """Classification by the word behind a prompt."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        template: str,
        words: Sequence[str],
        label: str,
        max_length: int,
    ) -> None:
        self._device = next(model.parameters()).device
        self._label = label
        self._loss = LabelWordLoss(
            model, tokenizer, template, list(words), label=label, max_length=max_length
        )

    def encode(self, rows: Sequence[Row]) -> Any:
        """See ``Objective``."""
        return self._loss.encode(rows).to(self._device)

    def loss(self, batch: Any) -> Tensor:
        """See ``Objective``."""
        return self._loss(batch)

    def losses(self, batch: Any) -> Tensor:
        """See ``Objective``."""
        return self._loss.losses(batch)

    @torch.no_grad()
    def score(self, rows: Sequence[Row], batch_size: int) -> Score:
        """See ``Objective``."""
        total, right = 0.0, 0
        for part in _parts(rows, batch_size):
            scores = self._loss.scores(self.encode(part)).float()
            labels = torch.tensor([row[self._label] for row in part], device=scores.device)
            total += float(nn.functional.cross_entropy(scores, labels, reduction="sum"))
            right += int((scores.argmax(dim=1) == labels).sum())
        return Score(total / len(rows), right / len(rows))


class Text(Objective):
    """Language modelling of the text that a template makes of each row."""

    def __init__(self, model: nn.Module, tokenizer: Any, template: str, max_length: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._fields = fields_of(template)
        self._max_length = max_length
        self._device = next(model.parameters()).device

    def encode(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """See ``Objective``; padding is not predicted."""
        texts = [self._template.format(**{f: row[f] for f in self._fields}) for row in rows]
        ids = self._tokenizer(texts, truncation=True, max_length=self._max_length)["input_ids"]
        longest = max(map(len, ids))
        if longest < 2:
            raise ValueError(f"no row of a batch has two tokens to learn from, as {texts[0]!r}")
        inputs = torch.zeros(len(ids), longest, dtype=torch.long)
        labels = torch.full((len(ids), longest), -100)
        mask = torch.zeros(len(ids), longest, dtype=torch.long)
        for i, row in enumerate(ids):
            inputs[i, : len(row)] = labels[i, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[i, : len(row)] = 1
        batch = {"input_ids": inputs, "attention_mask": mask, "labels": labels}
        return {name: value.to(self._device) for name, value in batch.items()}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """See ``Objective``."""
        loss: Tensor = self._model(**batch, use_cache=False).loss
        return loss

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        """See ``Objective``: of each row the mean over its tokens, 0 where it has none to learn."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = self._model(**inputs, use_cache=False).logits[:, :-1].float()
        targets = batch["labels"][:, 1:]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return losses.sum(dim=1) / (targets != -100).sum(dim=1).clamp(min=1)

    @torch.no_grad()
    def score(self, rows: Sequence[Row], batch_size: int) -> Score:
        """See ``Objective``."""
        total, tokens = 0.0, 0
        for part in _parts(rows, batch_size):
            batch = self.encode(part)
            count = int((batch["labels"][:, 1:] != -100).sum())
            total += float(self.loss(batch)) * count if count else 0.0
            tokens += count
        return Score(total / max(tokens, 1), None)


def _parts(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]
