"""Own directions against shared ones: held-out loss by forwards, each at its own best rate.

The last four blocks of SmolLM2-135M learn to rate film reviews (Rotten Tomatoes), with batches of
64 sentences, half of each label. Shared directions spend a batch on one direction (MeZO); own ones
cut it into groups of 8. Rates are chosen by the loss of a validation split, in runs with seeds of
their own; the held-out split, and SST-2, are looked at with the other seeds alone.

    python -m benchmarks.own_directions
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from zorba import ZerothOrderSGD
from zorba.apps.reviews import packages
from zorba.apps.reviews.data import Example, read_reviews
from zorba.apps.reviews.federation import Score, Suffix
from zorba.apps.reviews.settings import ReviewSettings
from zorba.hf import Prefix, find_blocks, run_prefix

from benchmarks.experiment import Results, Run, picture

SEEDS, TUNING_SEEDS = (1, 2, 3), (11,)
CLIP = 10.0  # of a scalar, for both: without it one bad step ends some runs
BATCH = 64  # sentences, half of each label
LONGEST = 24  # tokens
SPLIT = {"train": 1536, "validation": 384, "held out": 1200}  # sentences
POINTS = 8  # of a curve

# Evaluations of a run, options of the optimizer, and rates that are tried.
METHODS: dict[str, tuple[int, dict[str, Any], Sequence[float]]] = {
    "own, rank one": (
        10_000,
        {"placement": "fused", "directions": "own", "examples_per_direction": 8},
        (2e-3, 4e-3, 8e-3, 1.6e-2),
    ),
    "shared": (32_000, {"distribution": "rademacher"}, (1e-3, 2e-3, 4e-3)),
}
COLOURS = {"own, rank one": "#c8553d", "shared": "#3b6fa0"}


class Task:
    """Model and sentences, whose frozen prefix has run once."""

    def __init__(self) -> None:
        settings = ReviewSettings(longest=LONGEST)
        model, tokenizer = packages.load_model(settings.cache)
        reviews = read_reviews(settings, tokenizer)
        blocks = find_blocks(model)[-settings.trainable :]
        self.suffix = Suffix(model, blocks, reviews.answers, "rademacher")
        pool = [e for own in reviews.clients.values() for e in own]
        order = np.random.default_rng(7).permutation(len(pool))
        shuffled = iter([pool[i] for i in order])
        prefix = partial(self._prefix, model, blocks[0].module)
        self.parts = {
            name: prefix([next(shuffled) for _ in range(count)]) for name, count in SPLIT.items()
        }
        short = [e for batch in reviews.evaluation for e in batch if len(e.ids) <= LONGEST]
        self.parts["SST-2"] = prefix(short)
        self.start = [p.detach().clone() for p in self.suffix.blocks.parameters()]

    def _prefix(self, model: nn.Module, block: nn.Module, examples: Sequence[Example]) -> Prefix:
        """One prefix of all examples, which are padded to one length."""
        made = []
        for at in range(0, len(examples), BATCH):
            rows = [(*e.ids, *[0] * (LONGEST - len(e.ids))) for e in examples[at : at + BATCH]]
            made.append(
                run_prefix(model, block, rows, [e.label for e in examples[at : at + BATCH]])
            )
        last = torch.tensor([len(e.ids) - 1 for e in examples])
        hidden, labels = (torch.cat([getattr(p, n) for p in made]) for n in ("hidden", "labels"))
        return replace(made[0], hidden=hidden, labels=labels, last=last)

    def rows(self, part: str, which: Tensor | slice) -> Prefix:
        whole = self.parts[part]
        return replace(
            whole, hidden=whole.hidden[which], labels=whole.labels[which], last=whole.last[which]
        )

    @torch.no_grad()
    def measure(self, part: str) -> tuple[float, Score]:
        count = len(self.parts[part].labels)
        logits = [
            self.suffix.logits(self.rows(part, slice(at, at + BATCH)))
            for at in range(0, count, BATCH)
        ]
        labels = self.parts[part].labels
        loss = nn.functional.cross_entropy(torch.cat(logits), labels)
        return float(loss), Score.of(torch.cat(logits), labels)

    def batches(self, seed: int) -> Callable[[], Prefix]:
        """Batches whose sentences take turns in their label, so that groups are balanced too."""
        numbers = np.random.default_rng(seed)
        labels = self.parts["train"].labels.numpy()
        halves = [np.flatnonzero(labels == label) for label in (0, 1)]

        def draw() -> Prefix:
            picked = [numbers.choice(half, BATCH // 2, replace=False) for half in halves]
            return self.rows("train", torch.from_numpy(np.stack(picked, axis=1).reshape(-1)))

        return draw


def run(task: Task, method: str, lr: float, seed: int, parts: Sequence[str]) -> Run:
    """Fine-tunes; the curve is the loss of the first part by evaluations of a sentence."""
    budget, options, _ = METHODS[method]
    with torch.no_grad():
        for parameter, start in zip(task.suffix.blocks.parameters(), task.start, strict=True):
            parameter.copy_(start)
    optimizer = ZerothOrderSGD(task.suffix.blocks, lr, clip=CLIP, seed=seed, **options)
    own = options.get("directions") == "own"
    draw, steps = task.batches(seed), budget // (2 * BATCH)
    curve = [(0, task.measure(parts[0])[0])]
    for step in range(steps):
        prefix = draw()

        def losses(prefix: Prefix = prefix) -> Tensor:
            each = nn.functional.cross_entropy(
                task.suffix.logits(prefix), prefix.labels, reduction="none"
            )
            return each if own else each.mean()

        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.step(losses)
        if (step + 1) % (steps // POINTS) == 0:
            curve.append((2 * BATCH * (step + 1), task.measure(parts[0])[0]))
            print(f"  {curve[-1][0]}: {curve[-1][1]:.4f}", flush=True)
    found: Run = {"method": method, "lr": lr, "seed": seed, "curve": curve}
    for part in parts:
        loss, score = task.measure(part)
        found[part] = {"loss": loss, **score._asdict()}
    return found


def main() -> None:
    torch.set_num_threads(2)
    settings = {"split": SPLIT, "batch": BATCH, "longest": LONGEST, "clip": CLIP}
    results = Results(Path("benchmarks/results/own_directions.json"), settings)
    made: list[Task] = []

    def keep(name: str, *arguments: Any) -> Run:
        def make() -> Run:
            made.extend([] if made else [Task()])
            return run(made[0], *arguments)

        return results.run(name, make)

    best = {}
    for method, (_, _, rates) in METHODS.items():
        tried = {}
        for lr in rates:
            name = f"{method}, lr {lr:g}, tuning seed"
            runs = [keep(f"{name} {s}", method, lr, s, ["validation"]) for s in TUNING_SEEDS]
            losses = [one["validation"]["loss"] for one in runs]
            # A run that did not end with a number has none in the file.
            tried[lr] = np.inf if None in losses else float(np.mean(losses))
        best[method] = min(rates, key=lambda lr: tried[lr])
    with picture(Path("docs/images/own_directions.png"), 7, 4) as (axes,):
        for method, lr in best.items():
            runs = [
                keep(f"{method}, seed {seed}", method, lr, seed, ["held out", "SST-2"])
                for seed in SEEDS
            ]
            for one in runs:
                axes.plot(*zip(*one["curve"], strict=True), color=COLOURS[method], alpha=0.35)
            mean = np.mean([[loss for _, loss in one["curve"]] for one in runs], axis=0)
            axes.plot([at for at, _ in runs[0]["curve"]], mean, color=COLOURS[method], label=method)
            for part in ("held out", "SST-2"):
                for name in ("loss", "accuracy", "auc"):
                    values = [one[part][name] for one in runs]
                    print(
                        f"{method}, lr {lr:g}, {part} {name}: {np.mean(values):.4f} "
                        f"({', '.join(f'{v:.4f}' for v in values)})"
                    )
        axes.set(xlabel="evaluations of a sentence", ylabel="held-out loss")


if __name__ == "__main__":
    main()
