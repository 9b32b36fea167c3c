"""FinetuneSettings: every knob of ``zorba finetune``, written once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from zorba import defaults
from zorba.apps.command import by_commas, check_at_least


def split_words(text: str) -> tuple[str, ...]:
    """Returns label words from text with commas; the spaces in front of them belong to them."""
    return tuple(text.split(",")) if text else ()


def split_labels(text: str) -> tuple[str, ...]:
    """Returns values of labels from text with commas."""
    return tuple(part.strip() for part in split_words(text))


Words = Annotated[tuple[str, ...], by_commas(split_words, "A,B")]
Labels = Annotated[tuple[str, ...], by_commas(split_labels, "A,B")]


@dataclass(frozen=True)
class FinetuneSettings:
    """Fine-tune a language model without gradients.

    With label words it learns to classify: the word that is likeliest behind the prompt is the
    answer. Without, it learns the text that the template makes of each row. Writes the model, its
    trajectory (see zorba replay) or both, metrics.json and loss.png.
    """

    # The comment of a field is its help on the command line.
    model: Positional[str]  # Local folder or hub name of a language model.
    data: Path  # JSONL, CSV or TSV file to train on.
    eval_data: Path | None = None  # File to evaluate on.
    template: str = "{text}"  # Prompt over the fields of a row: "{sentence} It was".
    words: Words = ()  # Label words with the space in front, by commas: " terrible, great".
    label: str = "label"  # Field of the label.
    labels: Labels = ()  # Its values in the order of the words, by commas; sorted by default.
    steps: int = 1000  # Steps.
    batch_size: int = 16  # Rows in a batch.
    max_length: int = 256  # Tokens of a row at most.
    lr: float = 1e-6  # Learning rate; falls linearly to 0.
    eps: float = defaults.EPS  # Distance at which losses are taken.
    perturbations: int = defaults.NUM_PERTURBATIONS  # P: directions a step.
    # Kind of finite difference: central takes 2P losses a step, forward P + 1.
    estimator: defaults.Estimator = defaults.ESTIMATOR
    # Distribution of the noise; by default gaussian, and rank1 with placement fused.
    distribution: defaults.Distribution | None = None
    # Where perturbed weights live: in a buffer, which is exact; in the weights, which rounds; or
    # fused, nowhere, as linear layers and norms add the noise to what they compute.
    placement: Literal["scratch", "inplace", "fused"] = "scratch"
    # Directions of a batch: one for all rows, or own ones, each of a few rows. Own ones need
    # placement fused to run in one forward.
    directions: defaults.Directions = "shared"
    examples_per_direction: int = defaults.EXAMPLES_PER_DIRECTION  # Rows of an own direction.
    normalize: bool = False  # Divide the scalars of a step by their root mean square.
    blocks: str = "all"  # Blocks to train: all, or last:N.
    offload: Path | None = None  # Folder for idle blocks, which are then streamed to the device.
    momentum: float = 0.0  # Of heavy-ball SGD, replayed from seeds.
    weight_decay: float = 0.0  # Decoupled; spares norms and biases.
    clip: float | None = None  # Largest absolute value of a scalar.
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: the checkpoint's.
    device: str | None = None  # cpu, cuda or cuda:1; a GPU where there is one.
    seed: int = 0  # Of batches and noise.
    eval_every: int = 0  # Steps between evaluations; 0: at the start and the end.
    out: Path = Path("runs/finetune")  # Folder for all that is written.
    save: Literal["model", "trajectory", "both"] = "model"  # Which of the two to write.

    def __post_init__(self) -> None:
        """Refuses what would only fail, or pass in silence, once the model is loaded."""
        check_at_least(self, steps=1, batch_size=1, max_length=2, perturbations=1, eval_every=0)
        check_at_least(self, examples_per_direction=1)
        if self.save != "model" and self.placement == "inplace":
            raise ValueError(
                "a trajectory needs placement scratch or fused, not inplace: restoring in place "
                "rounds, which no record tells"
            )
        if self.placement == "fused" and self.distribution not in (None, "rank1"):
            raise ValueError(
                f"placement fused makes noise of distribution rank1, not {self.distribution}"
            )
        if len(self.words) == 1:
            raise ValueError(f"one label word, {self.words[0]!r}, leaves nothing to choose")
        if self.labels and len(self.labels) != len(self.words):
            raise ValueError(f"{len(self.labels)} labels but {len(self.words)} label words")
