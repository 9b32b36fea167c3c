"""Losses of examples: their mean is the loss that Trainer computes, over the kinds of models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from zorba import ZOTrainer
from zorba.hf.losses import ExampleLosses, MicroBatches

from tests.hf.test_trainer import arguments
from tests.hf.tiny import VOCABULARY, tiny_config
from tests.tolerances import bound

ROWS = 5


def ids(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(3, VOCABULARY, shape, generator=generator)


def ignored(labels: Tensor) -> Tensor:
    """Labels without some tokens, in another number in each row."""
    labels = labels.clone()
    for row in range(len(labels)):
        labels[row, : row + 1] = -100
    return labels


def tokens(kind: str, auto: str) -> Callable[[], tuple[nn.Module, dict[str, Tensor]]]:
    def make() -> tuple[nn.Module, dict[str, Tensor]]:
        x = ids(ROWS, 7)
        return build(kind, auto), {"input_ids": x, "labels": ignored(x.flip(1))}

    return make


def classes(labels: Tensor, **config: Any) -> Callable[[], tuple[nn.Module, dict[str, Tensor]]]:
    def make() -> tuple[nn.Module, dict[str, Tensor]]:
        model = build("bert", "ForSequenceClassification", **config)
        return model, {"input_ids": ids(ROWS, 7), "labels": labels}

    return make


def words() -> tuple[nn.Module, dict[str, Tensor]]:
    labels = ignored(ids(ROWS, 7) % 3)
    model = build("distilbert", "ForTokenClassification", num_labels=3)
    return model, {"input_ids": ids(ROWS, 7), "labels": labels}


def answers() -> tuple[nn.Module, dict[str, Tensor]]:
    starts = torch.tensor([0, 3, 9, 2, 1])  # one of them is cut off
    batch = {"start_positions": starts, "end_positions": torch.tensor([2, 9, 9, 6, 1])}
    return build("bert", "ForQuestionAnswering"), {"input_ids": ids(ROWS, 7), **batch}


def choices() -> tuple[nn.Module, dict[str, Tensor]]:
    batch = {"input_ids": ids(ROWS, 3, 7), "labels": torch.tensor([0, 2, 1, 1, 0])}
    return build("bert", "ForMultipleChoice"), batch


def build(kind: str, auto: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = tiny_config(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    return getattr(transformers, f"AutoModel{auto}").from_config(config).eval()


KINDS = {
    "causal": tokens("llama", "ForCausalLM"),
    "causal of another name": tokens("gpt2", "ForCausalLM"),
    "masked": tokens("bert", "ForMaskedLM"),
    "encoder-decoder": tokens("t5", "ForSeq2SeqLM"),
    "encoder-decoder of bart": tokens("bart", "ForSeq2SeqLM"),
    "token classification": words,
    "classification": classes(torch.tensor([0, 2, 1, 1, 0]), num_labels=3),
    "regression": classes(torch.randn(ROWS), num_labels=1),
    "regression of two": classes(torch.randn(ROWS, 2), num_labels=2, problem_type="regression"),
    "multi-label": classes((ids(ROWS, 3) % 2).float(), num_labels=3),
    "question answering": answers,
    "multiple choice": choices,
}


def trainer_of(folder: Path, model: nn.Module, given: Any = None, **changes: Any) -> ZOTrainer:
    options = {"zo_directions": "own", "zo_placement": "fused", **changes}
    return ZOTrainer(model=model, args=arguments(folder, **options), **(given or {}))


@torch.no_grad()
def both_losses(
    trainer: ZOTrainer, model: nn.Module, batch: dict[str, Tensor], sizes: list[int]
) -> tuple[Tensor, float]:
    """Losses of examples of a batch in micro-batches, and the loss that the trainer makes of it."""
    cut = {name: value.split(sizes) for name, value in batch.items()}
    parts = [dict(zip(cut, values, strict=True)) for values in zip(*cut.values(), strict=True)]
    _, items = trainer.get_batch_samples(iter(parts), len(parts), torch.device("cpu"))
    trainer.create_optimizer()
    losses = trainer._own_losses(model, items, MicroBatches(tuple(parts)))
    return losses, trainer._shared_loss(model, items, parts)


@pytest.mark.filterwarnings("ignore:placement='fused' cannot")
@pytest.mark.parametrize("sizes", [[5], [2, 3], [1, 3, 1]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_the_loss_of_trainer(kind: str, sizes: list[int], tmp_path: Path) -> None:
    model, batch = KINDS[kind]()
    losses, loss = both_losses(trainer_of(tmp_path, model), model, batch, sizes)
    assert losses.shape == (ROWS,)
    assert float(losses.mean()) == pytest.approx(loss, rel=bound("losses of examples"))


@pytest.mark.filterwarnings("ignore:placement='fused' cannot")
@pytest.mark.parametrize("kind", KINDS)
def test_each_is_the_loss_of_its_example(kind: str, tmp_path: Path) -> None:
    """Other tokens in a row change its loss, and that of no other example."""
    model, batch = KINDS[kind]()
    trainer = trainer_of(tmp_path, model)
    whole, _ = both_losses(trainer, model, batch, [ROWS])
    changed = {name: value.clone() for name, value in batch.items()}
    changed["input_ids"][1] = changed["input_ids"][1].flip(-1) % 50 + 3
    other, _ = both_losses(trainer, model, changed, [ROWS])
    apart = torch.arange(ROWS) != 1
    torch.testing.assert_close(
        other[apart], whole[apart], rtol=bound("losses of examples"), atol=1e-6
    )
    assert other[1] != whole[1]


@pytest.mark.filterwarnings("ignore:placement='fused' cannot")
@pytest.mark.parametrize("kind", ["causal", "masked", "classification", "token classification"])
@pytest.mark.parametrize("sizes", [[5], [2, 3]], ids=str)
def test_with_labels_that_trainer_smooths(kind: str, sizes: list[int], tmp_path: Path) -> None:
    model, batch = KINDS[kind]()
    trainer = trainer_of(tmp_path, model, label_smoothing_factor=0.2)
    losses, loss = both_losses(trainer, model, batch, sizes)
    assert float(losses.mean()) == pytest.approx(loss, rel=bound("losses of examples"))


@pytest.mark.parametrize("kind", ["causal", "classification", "multi-label", "regression"])
def test_models_in_16_bits(kind: str, tmp_path: Path) -> None:
    """Theirs is rounded to 8 bits where the model computes it so; that of examples is not."""
    model, batch = KINDS[kind]()
    model.to(torch.bfloat16)
    if kind in ("multi-label", "regression"):
        batch["labels"] = batch["labels"].to(torch.bfloat16)
    trainer = trainer_of(tmp_path, model, zo_placement="scratch")
    losses, loss = both_losses(trainer, model, batch, [ROWS])
    assert losses.dtype == torch.float32
    assert float(losses.mean()) == pytest.approx(loss, rel=bound("losses in 16 bits"))


@pytest.mark.filterwarnings("ignore:placement='fused' cannot")
@pytest.mark.parametrize("kind", [name for name in KINDS if name != "multiple choice"])
def test_examples_that_are_there_twice(kind: str, tmp_path: Path) -> None:
    """Both signs in one forward: each half has the losses of the batch."""
    model, batch = KINDS[kind]()
    trainer = trainer_of(tmp_path, model)
    _, items = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    trainer.create_optimizer()
    one = MicroBatches((batch,))
    with torch.no_grad():
        twice = trainer._own_losses(model, items, one.repeat(2))
        once = trainer._own_losses(model, items, one)
    torch.testing.assert_close(
        twice, torch.cat([once, once]), rtol=bound("losses of examples"), atol=1e-6
    )


def test_batches_that_cannot_be_there_twice() -> None:
    pictures = {"input_ids": ids(2, 7), "pixel_values": torch.ones(3, 4)}
    assert MicroBatches((pictures,)).repeat(2) is None
    assert MicroBatches(({"x": ids(2, 7)}, {"x": ids(2, 7)})).repeat(2) is None
    assert MicroBatches(({"x": ids(2, 7), "flag": True},)).repeat(2) is None


def test_soft_prompts_have_no_labels() -> None:
    model, batch = KINDS["causal"]()
    peft = pytest.importorskip("peft", reason="peft is in the test extra")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        outputs = adapted(**batch, attention_mask=torch.ones_like(batch["input_ids"]))
    losses = ExampleLosses(adapted)(outputs, batch, outputs.loss, None)
    assert float(losses.mean()) == pytest.approx(
        float(outputs.loss), rel=bound("losses of examples")
    )


def test_what_it_cannot_take() -> None:
    model, batch = KINDS["causal"]()
    with torch.no_grad():
        outputs = model(**batch)
    take = ExampleLosses(model)
    for wrong, words in (
        ((outputs, batch, outputs.loss + 0.01, None), "have the mean"),
        ((outputs.to_tuple(), batch, outputs.loss, None), "a tuple, which has no names"),
        ((outputs, {"input_ids": batch["input_ids"]}, outputs.loss, None), "of input_ids"),
        ((outputs, {"labels": batch["labels"][:, 0]}, outputs.loss, None), "and labels"),
    ):
        with pytest.raises(ValueError, match=words) as raised:
            take(*wrong)
        assert "compute_loss_func" in str(raised.value)
    # Nothing is proven by a loss that is not finite: the step is skipped, and the next one tells.
    broken = outputs.loss * torch.nan
    assert take(outputs, batch, broken, None).shape == (ROWS,)
    with pytest.raises(ValueError, match="have the mean"):
        take(outputs, batch, outputs.loss * 2, None)
