"""Settings of a fine-tune from the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FinetuneSettings:
    """What ``zorba finetune`` is told.

    Attributes:
        model: local folder or hub name.
        data: JSONL or CSV file to train on.
        eval_data: file to evaluate on; none for the loss of training alone.
        template: format string over the fields of a row.
        words: label words, in the order of ``labels``; empty for language modelling of the text
            that the template makes.
        label: field that holds a row's label.
        labels: values of that field in the order of ``words``; empty for the sorted values.
        steps: of the optimizer.
        batch_size: rows in a batch.
        max_length: tokens of a row at most.
        lr: learning rate; falls linearly to 0.
        eps: distance at which losses are taken.
        perturbations: P, directions a step.
        estimator: "central" or "forward".
        distribution: "gaussian" or "rademacher".
        placement: "scratch" or "inplace".
        blocks: "all", or "last:N".
        offload: folder for the weights of idle blocks, which are then streamed; None to keep them
            on the device.
        momentum: of heavy-ball SGD.
        weight_decay: decoupled.
        clip: largest size of a scalar, or None.
        dtype: "auto" for that of the checkpoint, "float32", "bfloat16" or "float16".
        device: where to run, "cuda" if there is one by default.
        seed: of batches and noise.
        eval_every: steps between evaluations; 0 for the start and the end alone.
        out: folder for everything that is written.
        save: "model", "trajectory" or "both".
    """

    model: str
    data: Path
    eval_data: Path | None = None
    template: str = "{text}"
    words: tuple[str, ...] = ()
    label: str = "label"
    labels: tuple[str, ...] = ()
    steps: int = 1000
    batch_size: int = 16
    max_length: int = 256
    lr: float = 1e-6
    eps: float = 1e-3
    perturbations: int = 1
    estimator: str = "central"
    distribution: str = "rademacher"
    placement: str = "scratch"
    blocks: str = "all"
    offload: Path | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0
    eval_every: int = 0
    out: Path = Path("runs/finetune")
    save: str = "model"

    def __post_init__(self) -> None:
        """Checks what nothing below would check in time."""
        if self.save not in ("model", "trajectory", "both"):
            raise ValueError(f"save is {self.save!r}; expected model, trajectory or both")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(
                f"dtype is {self.dtype!r}; expected auto, float32, bfloat16 or float16"
            )
        if self.save != "model" and self.placement != "scratch":
            raise ValueError(
                f"a trajectory needs placement scratch, not {self.placement}: restoring in place "
                "rounds, which no record tells"
            )
        if len(self.words) == 1:
            raise ValueError(f"one label word, {self.words[0]!r}, leaves nothing to choose")
        if self.labels and len(self.labels) != len(self.words):
            raise ValueError(f"{len(self.labels)} labels but {len(self.words)} label words")


def split_words(text: str) -> tuple[str, ...]:
    """Returns label words from text with commas; the spaces in front of them belong to them."""
    return tuple(text.split(",")) if text else ()


def split_labels(text: str) -> tuple[str, ...]:
    """Returns values of labels from text with commas."""
    return tuple(part.strip() for part in text.split(",")) if text else ()
