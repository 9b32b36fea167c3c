"""Losses of single rows: what each has alone, whoever is in the batch with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from zorba.apps.finetune.objective import LabelWords, Objective, Text

from tests.apps.finetune.tiny import ROWS, save_tiny_llama

LONG = [{"sentence": row["sentence"], "label": int(row["label"] == "positive")} for row in ROWS]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = save_tiny_llama(tmp_path_factory.mktemp("model"), torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def make(kind: str, parts: tuple[Any, Any]) -> Objective:
    if kind == "text":
        return Text(*parts, "{sentence}", 32)
    words = [" terrible", " great"] if kind == "words" else [" bad film", " great"]
    return LabelWords(*parts, "{sentence} It was", words, max_length=32)


@pytest.mark.parametrize("kind", ["words", "words of two tokens", "text"])
@torch.no_grad()
def test_losses_are_those_of_the_rows_alone(kind: str, parts: tuple[Any, Any]) -> None:
    objective = make(kind, parts)
    losses = objective.losses(objective.encode(LONG))
    alone = [objective.loss(objective.encode([row])) for row in LONG]
    assert losses.shape == (len(LONG),)
    assert losses.dtype == torch.float32
    assert len(set(losses.tolist())) > 4
    torch.testing.assert_close(losses, torch.stack(alone), rtol=1e-5, atol=1e-6)
    if kind != "text":  # there the mean is over tokens
        mean = objective.loss(objective.encode(LONG))
        torch.testing.assert_close(losses.mean(), mean, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["words", "text"])
def test_score_is_that_of_one_batch_however_it_is_cut(kind: str, parts: tuple[Any, Any]) -> None:
    objective = make(kind, parts)
    rows = [*LONG[:5], {"sentence": "a fine film", "label": 1}]
    whole = float(objective.loss(objective.encode(rows)))
    for size in (1, 4, 6):
        score = objective.score(rows, size)
        assert score.loss == pytest.approx(whole, rel=1e-5)
        if isinstance(objective, LabelWords):
            right = objective.predict(objective.encode(rows)).tolist()
            labels = [row["label"] for row in rows]
            hits = sum(a == b for a, b in zip(right, labels, strict=True))
            assert score.accuracy == hits / len(rows)
        else:
            assert score.accuracy is None


@torch.no_grad()
def test_row_with_nothing_to_learn_loses_nothing(parts: tuple[Any, Any]) -> None:
    objective = make("text", parts)
    losses = objective.losses(objective.encode([{"sentence": "a"}, {"sentence": "a film"}]))
    assert losses[0] == 0
    assert losses[1] > 0


@torch.no_grad()
def test_rows_without_labels_have_no_losses(parts: tuple[Any, Any]) -> None:
    objective = make("words", parts)
    with pytest.raises(ValueError, match="no field 'label'"):
        objective.losses(objective.encode([{"sentence": "a film"}]))
