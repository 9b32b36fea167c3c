"""The text: Rotten Tomatoes to train on, SST-2 to evaluate on."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

PROMPT = "{} It was"
ANSWERS = (" terrible", " great")
"""The words that answer the prompt for label 0 and label 1."""


@dataclass(frozen=True)
class Example:
    """One labelled sentence: the token ids of its prompt and its label."""

    ids: tuple[int, ...]
    label: int


def read_rotten_tomatoes(path: Path) -> list[tuple[str, int]]:
    """Returns the (sentence, label) rows of Rotten Tomatoes out of the reviews' CSV file."""
    names = {"0": 0, "1": 1, "negative": 0, "positive": 1, "neg": 0, "pos": 1}
    with path.open(newline="", encoding="utf-8") as file:
        return [
            (row["text"].strip(), names[row["label"].lower()])
            for row in csv.DictReader(file)
            if row["source"] == "rotten_tomatoes"
        ]


def read_sst2(folder: Path) -> list[tuple[str, int]]:
    """Returns the (sentence, label) rows of a saved ``datasets`` folder."""
    import pyarrow

    rows: list[tuple[str, int]] = []
    for path in sorted(folder.glob("*.arrow")):
        with pyarrow.OSFile(str(path), "rb") as file:
            table = pyarrow.ipc.open_stream(file).read_all()
        sentences = (s.strip() for s in table.column("sentence").to_pylist())
        rows += zip(sentences, table.column("label").to_pylist(), strict=True)
    return rows


def drop_leaks(
    train: Sequence[tuple[str, int]], held_out: Sequence[tuple[str, int]]
) -> list[tuple[str, int]]:
    """Returns the training rows whose letters and digits are not those of a held-out row."""

    def key(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    seen = {key(text) for text, _ in held_out}
    return [row for row in train if key(row[0]) not in seen]


def tokenise(rows: Sequence[tuple[str, int]], tokenizer: Any) -> list[Example]:
    """Returns the rows as prompts, tokenised."""
    ids = tokenizer([PROMPT.format(text) for text, _ in rows])["input_ids"]
    return [Example(tuple(i), label) for i, (_, label) in zip(ids, rows, strict=True)]


def answer_ids(tokenizer: Any) -> list[int]:
    """Returns the token ids of the answer words of label 0 and 1."""
    return [tokenizer(answer)["input_ids"][0] for answer in ANSWERS]


def split_clients(
    labels: Sequence[int],
    clients: int,
    alpha: float,
    least: int,
    least_each: int,
    rng: np.random.Generator,
) -> list[list[int]]:
    """Splits rows over clients, each label by a Dirichlet draw of its own.

    Args:
        labels: label of each row.
        clients: how many.
        alpha: concentration; small is uneven.
        least: rows that every client must get; the draw is repeated until it does.
        least_each: rows of each label that every client must get.
        rng: source of randomness.

    Returns:
        Row indices of each client, shuffled.

    Raises:
        ValueError: 10,000 draws did not give every client enough.
    """
    array = np.asarray(labels)
    values = np.unique(array)
    # Most draws of a small alpha leave some client with too little, so it takes many tries.
    for _ in range(10_000):
        parts: list[list[int]] = [[] for _ in range(clients)]
        for value in values:
            rows = rng.permutation(np.flatnonzero(array == value))
            cuts = (np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(rows)).astype(int)
            for part, piece in zip(parts, np.split(rows, cuts), strict=True):
                part.extend(int(i) for i in piece)
        enough = (
            len(part) >= least and all((array[part] == v).sum() >= least_each for v in values)
            for part in parts
        )
        if all(enough):
            return [[part[i] for i in rng.permutation(len(part))] for part in parts]
    raise ValueError(
        f"no split of {len(array)} rows gives each of {clients} clients {least} rows and "
        f"{least_each} of each label: use fewer clients or a larger alpha"
    )


def batches_by_length(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """Yields batches of similar lengths, so that little of them is padding."""
    ordered = sorted(examples, key=lambda example: len(example.ids))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def balanced_batches(pool: Sequence[Example], rows: int, size: int) -> list[list[Example]]:
    """Returns batches with as many rows of label 0 as of label 1, and of similar lengths.

    Balance lets few perturbations do: the answer words start with a bias, and a batch with a label
    to spare measures mostly that, not the ranking. A label that a client is short of is repeated.

    Args:
        pool: a client's examples, both labels among them.
        rows: in all batches together, a multiple of ``size``.
        size: rows of a batch, even.
    """
    if size % 2 or rows % size:
        raise ValueError(f"batch size {size} must be even and divide the {rows} rows of a pool")
    # Both halves are sorted by length before they are paired: little of a batch is padding.
    halves = []
    for label in (0, 1):
        mine = [example for example in pool if example.label == label]
        if not mine:
            raise ValueError(f"a client has no sentence of label {label}")
        mine = (mine * (rows // 2 // len(mine) + 1))[: rows // 2]
        halves.append(sorted(mine, key=lambda example: len(example.ids)))
    half = size // 2
    return [halves[0][i : i + half] + halves[1][i : i + half] for i in range(0, rows // 2, half)]


def pick(batches: Sequence[T], number: int, seed: int) -> T:
    """Returns the number-th batch (from 0) of an endless row: one shuffled deck after another.

    Args:
        batches: of a client.
        number: of the batch.
        seed: of the order; the same number and seed give the same batch.
    """
    deck, turn = divmod(number, len(batches))
    order = np.random.default_rng([seed, deck]).permutation(len(batches))
    return batches[int(order[turn])]
