"""The loss that is minimised: of label words, or of the text itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from zorba.apps.finetune.data import Row
from zorba.hf.label_words import LabelWordBatch, LabelWordLoss

_IGNORED = -100  # as a label: a position that is not predicted


class Score(NamedTuple):
    """Score of a whole data set.

    Attributes:
        loss: mean over rows (label words) or predicted tokens (text).
        accuracy: share of rows whose right label word scores best; None for text.
    """

    loss: float
    accuracy: float | None


class LabelWords(LabelWordLoss):
    """Classification by the word behind a prompt."""

    def loss(self, batch: LabelWordBatch) -> Tensor:
        """Returns the mean loss of a batch: float32 []."""
        return self(batch)

    @torch.no_grad()
    def score(self, rows: Sequence[Row], batch_size: int) -> Score:
        """Returns the score of a data set."""
        total, right = 0.0, 0
        for batch in map(self.encode, _parts(rows, batch_size)):
            assert batch.labels is not None
            scores = self.scores(batch).float()
            total += float(nn.functional.cross_entropy(scores, batch.labels, reduction="sum"))
            right += int((scores.argmax(dim=1) == batch.labels).sum())
        return Score(total / len(rows), right / len(rows))


class Text:
    """Language modelling of the text that a template makes of each row.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        template: format string over the fields of a row.
        max_length: tokens of a row at most.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, template: str, max_length: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._max_length = max_length

    def encode(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Returns a batch on the model's device: int64 [rows, longest] each, padded on the right.

        Raises:
            ValueError: no row has two tokens, so there is nothing to predict.
        """
        texts = [self._template.format_map(row) for row in rows]
        ids = self._tokenizer(texts, truncation=True, max_length=self._max_length)["input_ids"]
        if max(map(len, ids)) < 2:
            raise ValueError(f"no row of a batch has two tokens to learn from, as {texts[0]!r}")
        tokens = [torch.tensor(row, dtype=torch.long) for row in ids]
        labels = pad_sequence(tokens, batch_first=True, padding_value=_IGNORED)
        labels = labels.to(next(self._model.parameters()).device)
        real = labels != _IGNORED
        # Any token may stand where there is none: it is masked and not predicted.
        return {"input_ids": labels * real, "attention_mask": real.long(), "labels": labels}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the mean loss over the predicted tokens of a batch: float32 []."""
        loss: Tensor = self._model(**batch, use_cache=False).loss
        return loss

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns each row's mean over its predicted tokens, 0 where it has none: float32 [rows].

        A row's loss is the same whatever other rows are in the batch.
        """
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = self._model(**inputs, use_cache=False).logits[:, :-1].float()
        targets = batch["labels"][:, 1:]
        # In float32, and by row: the model's own loss is one mean over all tokens of the batch.
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return losses.sum(dim=1) / _predicted(batch).clamp(min=1)

    @torch.no_grad()
    def score(self, rows: Sequence[Row], batch_size: int) -> Score:
        """Returns the score of a data set."""
        total, tokens = 0.0, 0
        for batch in map(self.encode, _parts(rows, batch_size)):
            counts = _predicted(batch)
            total += float((self.losses(batch) * counts).sum())
            tokens += int(counts.sum())
        return Score(total / max(tokens, 1), None)


Objective = LabelWords | Text


def _predicted(batch: dict[str, Tensor]) -> Tensor:
    """Number of predicted tokens of each row, all but its first: int64 [rows]."""
    return (batch["labels"][:, 1:] != _IGNORED).sum(dim=1)


def _parts(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    return (rows[i : i + size] for i in range(0, len(rows), size))
