"""The task of a fine-tune: rows of files, a model, and the loss of label words or of the text."""

from __future__ import annotations

import csv
import json
import string
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from zorba.apps.finetune.settings import FinetuneSettings
from zorba.hf import LabelWordLoss

Row = dict[str, Any]

_IGNORED = -100  # as a label: a position that is not predicted

csv.field_size_limit(sys.maxsize)  # a document is one field


def read_data(settings: FinetuneSettings) -> tuple[list[Row], list[Row], list[str]]:
    """Returns rows to train on, rows to evaluate on, and the labels in the order of the words.

    Where there are words, the field of the label then holds the place of its word. ValueError: a
    file, or template and words, that do not fit; the message says where.
    """
    names = [name for _, name, _, _ in string.Formatter().parse(settings.template) if name]
    # The tokenizer's mask token is no field of a row.
    needed = [name for name in dict.fromkeys(names) if name != "mask"]
    if not needed:
        raise ValueError(f"the template {settings.template!r} has no field such as {{text}}")
    field, labels = settings.label, list(settings.labels)
    if settings.words:
        needed.append(field)
    rows = _read_rows(settings.data, needed)
    evaluation = _read_rows(settings.eval_data, needed) if settings.eval_data else []
    if not settings.words:
        return rows, evaluation, []
    if not labels:
        # Sorted, numbers by size: an order that is the same on every machine.
        values = {str(row[field]) for row in rows}
        numbers = all(value.lstrip("-").isdecimal() for value in values)
        labels = sorted(values, key=int if numbers else str)
    if len(labels) != len(settings.words):
        raise ValueError(
            f"{settings.data} has {len(labels)} labels ({', '.join(labels[:8])}) but there are "
            f"{len(settings.words)} label words ({', '.join(settings.words)})"
        )
    expected = ", ".join(labels)
    for number, row in (*enumerate(rows, 1), *enumerate(evaluation, 1)):
        if str(row[field]) not in labels:
            raise ValueError(f"row {number} has {field} {row[field]!r}; expected one of {expected}")
        row[field] = labels.index(str(row[field]))
    return rows, evaluation, labels


def _read_rows(path: Path, needed: list[str]) -> list[Row]:
    """Returns the rows of a file of a kind that its name tells; each has the needed fields."""
    separators = {".jsonl": "", ".ndjson": "", ".csv": ",", ".tsv": "\t"}
    kind, line, rows = path.suffix.lower(), 0, list[Row]()
    if kind not in separators:
        raise ValueError(f"{path} ends in {kind or 'nothing'}; expected .jsonl, .csv or .tsv")
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, delimiter=separators[kind] or ",")
        lines: Iterable[Any] = table if separators[kind] else file
        try:
            for number, read in enumerate(lines, 1):
                line = table.line_num or number  # a row of a table may have several lines
                if isinstance(read, str) and not read.strip():
                    continue
                row = json.loads(read) if isinstance(read, str) else read
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object, got {str(read)[:40]}")
                missing = ", ".join(name for name in needed if row.get(name) is None)
                if missing:
                    raise ValueError(f"no {missing}; the row has {', '.join(row)}")
                rows.append(row)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}, line {line}: {error}") from None
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def device_of(settings: FinetuneSettings) -> str:
    """Returns where the model computes: a GPU where there is one, unless told otherwise."""
    return settings.device or ("cuda" if torch.cuda.is_available() else "cpu")


def load_model(settings: FinetuneSettings) -> tuple[Any, Any]:
    """Returns the model in evaluation mode, and its tokenizer; OSError where there is none."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    config = AutoConfig.from_pretrained(settings.model)
    masked = any("MaskedLM" in name for name in config.architectures or [])
    kind = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    dtype = getattr(torch, settings.dtype, "auto")
    model: Any = kind.from_pretrained(settings.model, dtype=dtype)
    # With offload a model that fills the host must not pass through the device as a whole.
    if settings.offload is None:
        model = model.to(device_of(settings))
    return model.eval(), AutoTokenizer.from_pretrained(settings.model)


@dataclass(frozen=True)
class Text:
    """Language modelling of the text that a template makes of each row."""

    model: nn.Module
    tokenizer: Any
    template: str
    max_length: int
    by_row: ClassVar[bool] = True  # as of ``LabelWordLoss``

    def encode(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Returns int64 [rows, longest] each on the model's device, padded on the right."""
        texts = [self.template.format_map(row) for row in rows]
        ids = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        if max(map(len, ids)) < 2:
            raise ValueError(f"no row of a batch has two tokens to learn from, as {texts[0]!r}")
        tokens = [torch.tensor(row, dtype=torch.long) for row in ids]
        labels = pad_sequence(tokens, batch_first=True, padding_value=_IGNORED)
        labels = labels.to(next(self.model.parameters()).device)
        real = labels != _IGNORED
        # Any token may stand where there is none: it is masked and not predicted.
        return {"input_ids": labels * real, "attention_mask": real.long(), "labels": labels}

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the mean over the predicted tokens of a batch: float32 []."""
        loss: Tensor = self.model(**batch, use_cache=False).loss
        return loss

    def losses(self, batch: dict[str, Tensor], by_tokens: bool = False) -> Tensor:
        """Returns each row's mean over its predicted tokens, 0 without any: float32 [rows].

        ``by_tokens`` weighs the rows by their tokens: the mean is then that over all tokens.
        """
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = self.model(**inputs, use_cache=False).logits[:, :-1].float()
        targets = batch["labels"][:, 1:]
        # By row, as the model's own loss is one mean over all tokens of the batch: a row's loss is
        # the same whatever other rows are in it.
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        tokens = (targets != _IGNORED).sum(dim=1)
        if by_tokens:
            return losses.sum(dim=1) * (len(tokens) / tokens.sum())
        return losses.sum(dim=1) / tokens.clamp(min=1)


Objective = LabelWordLoss | Text


def make_objective(settings: FinetuneSettings, model: Any, tokenizer: Any) -> Objective:
    """Returns the loss of label words, or of the text itself where there are none."""
    template, words, label = settings.template, settings.words, settings.label
    if not words:
        return Text(model, tokenizer, template, settings.max_length)
    longest = settings.max_length
    return LabelWordLoss(model, tokenizer, template, words, label=label, max_length=longest)


@torch.no_grad()
def score(objective: Objective, rows: Sequence[Row], size: int) -> dict[str, float | None]:
    """Returns the mean loss over rows, or tokens of text, and the share of right label words."""
    total, count, right = 0.0, 0, 0
    for part in (rows[i : i + size] for i in range(0, len(rows), size)):
        if isinstance(objective, Text):
            text = objective.encode(part)
            predicted = int((text["labels"][:, 1:] != _IGNORED).sum())
            total += float(objective(text)) * predicted
            count += predicted
        else:
            batch = objective.encode(part)
            assert batch.labels is not None
            scores = objective.scores(batch)
            total += float(nn.functional.cross_entropy(scores, batch.labels, reduction="sum"))
            right += int((scores.argmax(dim=1) == batch.labels).sum())
            count += len(part)
    accuracy = None if isinstance(objective, Text) else right / count
    return {"loss": total / count, "accuracy": accuracy}
