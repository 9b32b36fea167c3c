"""What a client measures: the loss over two answer words, from a cached prefix on."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import zorba_kernels as zk
from zorba.apps.reviews.data import Example, pick
from zorba.hf import Block, Prefix, extend_prefix, run_prefix, run_suffix
from zorba.optim import Evaluate, NoiseTerms, ScratchPlacement, one_by_one


class Suffix:
    """The trainable end of a model: its last blocks, the norm and two rows of the head.

    Args:
        model: a causal language model with a final norm ``model.model.norm``.
        blocks: its last blocks, which are trained.
        answers: token ids of the answer words of label 0 and 1; their rows of the head are frozen.
        distribution: of the noise.
        copied: whether the blocks are copies, so that the model's own stay as they are.
    """

    def __init__(
        self,
        model: Any,
        blocks: Sequence[Block],
        answers: Sequence[int],
        distribution: str,
        copied: bool = False,
    ) -> None:
        modules = [copy.deepcopy(b.module) if copied else b.module for b in blocks]
        self.blocks = nn.ModuleList(modules)
        self.norm = model.model.norm
        self.head = model.get_output_embeddings().weight.detach()[list(answers)].clone()
        # Noise is keyed by the names that the parameters have in the whole model.
        groups = {name: b for b, block in enumerate(blocks) for name in block.parameters}
        parameters = [p for module in modules for p in module.parameters()]
        self.table = zk.ParamTable(
            zip(groups, parameters, strict=True), groups=groups, num_groups=len(blocks)
        )
        self.placement = ScratchPlacement(self.blocks, self.table, distribution)

    def logits(self, prefix: Prefix, first: int = 0) -> Tensor:
        """Returns float32 [batch, 2] for a prefix in front of trainable block ``first``."""
        return run_suffix(prefix, list(self.blocks)[first:], self.norm, self.head)

    def loss(self, prefix: Prefix, first: int, terms: NoiseTerms) -> float:
        """Returns the cross-entropy over the two answers at the weights plus ``terms``."""
        with torch.no_grad(), self.placement.session():
            self.placement.move_to(terms)
            logits = self.logits(prefix, first)
        return float(nn.functional.cross_entropy(logits, prefix.labels))


class Pool:
    """A client's cached batches, and the objective that its federated client calls.

    The frozen blocks in front of the trainable ones run once for the whole fine-tune, and the
    trainable blocks in front of the client's first active one once a step for all perturbations.

    Args:
        suffix: the replica that the client works on.
        prefixes: its batches in front of the first trainable block.
        mask: bool [blocks], which trainable blocks the client activates.
        local_steps: K, local steps of a round; each takes the next batch.
        seed: of the order of its batches.

    Attributes:
        steps: local steps that were measured.
        seconds: that they took.
    """

    def __init__(
        self,
        suffix: Suffix,
        prefixes: Sequence[Prefix],
        mask: Sequence[bool],
        local_steps: int,
        seed: int,
    ) -> None:
        self.suffix = suffix
        self.prefixes = list(prefixes)
        self.first = list(mask).index(True)
        self.local_steps = local_steps
        self.seed = seed
        self.steps = 0
        self.seconds = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the cached hidden states."""
        return sum(prefix.nbytes for prefix in self.prefixes)

    def objective(self, round_: int, step: int) -> tuple[Evaluate, int]:
        """Returns the loss function of one local step and its number of examples.

        The batch is a function of (round, step) alone: a repeated plan measures the same.
        """
        # No counter of its own: after a lost message the server asks for the same step again.
        prefix = pick(self.prefixes, (round_ - 1) * self.local_steps + step, self.seed)
        started = time.perf_counter()
        near = extend_prefix(prefix, list(self.suffix.blocks)[: self.first])
        self.seconds += time.perf_counter() - started

        def evaluate(terms: NoiseTerms) -> float:
            started = time.perf_counter()
            loss = self.suffix.loss(near, self.first, terms)
            self.seconds += time.perf_counter() - started
            return loss

        self.steps += 1
        return one_by_one(evaluate), len(prefix.labels)


@dataclass(frozen=True)
class Score:
    """Accuracy and area under the ROC curve."""

    accuracy: float
    auc: float

    @staticmethod
    def of(logits: Tensor, labels: Tensor) -> Score:
        """Returns the score of logits, float [n, 2], for labels, int64 [n]; both must occur."""
        margin = logits[:, 1] - logits[:, 0]
        positive = labels == 1
        # The area is the share of (positive, negative) pairs in the right order; ties count half.
        ahead = margin[positive][:, None] - margin[~positive]
        wins = float((ahead > 0).sum()) + 0.5 * float((ahead == 0).sum())
        accuracy = float(((margin > 0) == positive).float().mean())
        return Score(accuracy, wins / ahead.numel())


@torch.no_grad()
def score_of(suffix: Suffix, prefixes: Sequence[Prefix]) -> Score:
    """Returns the score of the unperturbed weights on an evaluation set."""
    logits = torch.cat([suffix.logits(prefix) for prefix in prefixes])
    return Score.of(logits, torch.cat([prefix.labels for prefix in prefixes]))


def prefixes_of(
    model: nn.Module,
    block: nn.Module,
    batches: Sequence[Sequence[Example]],
    on_batch: Callable[[], None] = lambda: None,
) -> list[Prefix]:
    """Runs the blocks in front of a block on batches, and calls ``on_batch`` after each."""
    prefixes = []
    for batch in batches:
        prefixes.append(run_prefix(model, block, [e.ids for e in batch], [e.label for e in batch]))
        on_batch()
    return prefixes
