"""Losses of single rows: what each has alone, whoever is in the batch with it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from zorba.apps.finetune.task import Objective, Text, score
from zorba.hf import LabelWordLoss

from tests.apps.finetune.tiny import ROWS, save_tiny_llama

LONG = [{"sentence": row["sentence"], "label": int(row["label"] == "positive")} for row in ROWS]
WORDS = {"words": [" terrible", " great"], "words of two tokens": [" bad film", " great"]}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    folder = save_tiny_llama(tmp_path_factory.mktemp("model"), torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return Text(model, AutoTokenizer.from_pretrained(folder), "{sentence}", 32)


@pytest.fixture(params=[*WORDS, "text"])
def objective(request: pytest.FixtureRequest, text: Text) -> Objective:
    if request.param == "text":
        return text
    template, words = "{sentence} It was", WORDS[request.param]
    return LabelWordLoss(text.model, text.tokenizer, template, words, max_length=32)


@torch.no_grad()
def test_losses_are_those_of_the_rows_alone(objective: Objective) -> None:
    losses = objective.losses(objective.encode(LONG))
    alone = [objective(objective.encode([row])) for row in LONG]
    assert losses.shape == (len(LONG),)
    assert losses.dtype == torch.float32
    assert len(set(losses.tolist())) > 4
    torch.testing.assert_close(losses, torch.stack(alone), rtol=1e-5, atol=1e-6)
    if isinstance(objective, LabelWordLoss):  # text has a mean over tokens
        mean = objective(objective.encode(LONG))
        torch.testing.assert_close(losses.mean(), mean, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_score_is_that_of_one_batch_however_it_is_cut(objective: Objective) -> None:
    rows = [*LONG[:5], {"sentence": "a fine film", "label": 1}]
    whole = float(objective(objective.encode(rows)))
    accuracy = None
    if isinstance(objective, LabelWordLoss):
        said = objective.predict(objective.encode(rows)).tolist()
        accuracy = sum(a == row["label"] for a, row in zip(said, rows, strict=True)) / len(rows)
    for size in (1, 4, 6):
        found = score(objective, rows, size)
        assert found == {"loss": pytest.approx(whole, rel=1e-5), "accuracy": accuracy}


@torch.no_grad()
def test_row_with_nothing_to_learn_loses_nothing(text: Text) -> None:
    losses = text.losses(text.encode([{"sentence": "a"}, {"sentence": "a film"}]))
    assert losses[0] == 0
    assert losses[1] > 0
    with pytest.raises(ValueError, match="no row of a batch has two tokens"):
        text.encode([{"sentence": "a"}])
