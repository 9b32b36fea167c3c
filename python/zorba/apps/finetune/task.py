"""The task of a fine-tune: rows of files, a model, and the objective on them."""

from __future__ import annotations

from typing import Any

import torch

from zorba.apps.finetune import data
from zorba.apps.finetune.objective import LabelWords, Objective, Text
from zorba.apps.finetune.settings import FinetuneSettings


def read_data(settings: FinetuneSettings) -> tuple[list[data.Row], list[data.Row], list[str]]:
    """Returns rows to train on, rows to evaluate on, and the labels in the order of the words.

    Raises:
        ValueError: a file, or template and words, that do not fit; the message says where.
        OSError: a file cannot be read.
    """
    needed = data.fields_of(settings.template)
    if not needed:
        raise ValueError(f"the template {settings.template!r} has no field such as {{text}}")
    if settings.words:
        needed.append(settings.label)
    rows = data.read_rows(settings.data, needed)
    evaluation = data.read_rows(settings.eval_data, needed) if settings.eval_data else []
    if not settings.words:
        return rows, evaluation, []
    # Without an order from the user the sorted values have one, the same on every machine.
    labels = list(settings.labels) or data.values_of(rows, settings.label)
    if len(labels) != len(settings.words):
        raise ValueError(
            f"{settings.data} has {len(labels)} labels ({', '.join(labels[:8])}) but there are "
            f"{len(settings.words)} label words ({', '.join(settings.words)})"
        )
    rows = data.index_labels(rows, settings.label, labels)
    return rows, data.index_labels(evaluation, settings.label, labels), labels


def load_model(settings: FinetuneSettings) -> tuple[Any, Any]:
    """Returns the model in evaluation mode, and its tokenizer.

    The model is on its device, or on the host where its idle blocks are to be offloaded.

    Raises:
        OSError: there is no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    config = AutoConfig.from_pretrained(settings.model)
    masked = any("MaskedLM" in name for name in getattr(config, "architectures", None) or [])
    kind = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model: Any = kind.from_pretrained(settings.model, dtype=dtype)
    # With offload a model that fills the host must not pass through the device as a whole.
    if settings.offload is None:
        model = model.to(device_of(settings))
    return model.eval(), AutoTokenizer.from_pretrained(settings.model)


def device_of(settings: FinetuneSettings) -> str:
    """Returns where the model computes: a GPU where there is one, unless told otherwise."""
    return settings.device or ("cuda" if torch.cuda.is_available() else "cpu")


def make_objective(settings: FinetuneSettings, model: Any, tokenizer: Any) -> Objective:
    """Returns the loss of label words, or of the text itself where there are none."""
    template, longest = settings.template, settings.max_length
    if not settings.words:
        return Text(model, tokenizer, template, longest)
    return LabelWords(
        model, tokenizer, template, settings.words, label=settings.label, max_length=longest
    )
