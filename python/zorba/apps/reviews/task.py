"""What a client of the demo measures: the loss over two answer words, from a cached prefix on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import zorba_kernels as zk
from zorba.apps.reviews.data import Example, pick
from zorba.hf import Prefix, extend_prefix, run_prefix, run_suffix
from zorba.optim import Evaluate, NoiseTerms, ScratchPlacement, one_by_one


@dataclass
class Seconds:
    """Where the time of the clients' steps went."""

    steps: float = 0.0
    count: int = 0


class Suffix:
    """The trainable end of a model: its last blocks, the norm and two rows of the head.

    Args:
        blocks: the trainable blocks, to the last one of the model.
        names: canonical names of each block's parameters in the whole model.
        norm: the final norm; frozen.
        head: Tensor  # [2, width], rows of the output embedding for the two answer words; frozen
        distribution: of the noise.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        names: Sequence[Sequence[str]],
        norm: nn.Module,
        head: Tensor,
        distribution: str,
    ) -> None:
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = head
        groups = {name: b for b, block_names in enumerate(names) for name in block_names}
        parameters = [p for block in blocks for p in block.parameters()]
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
        seconds: where its time is added up.
    """

    def __init__(
        self,
        suffix: Suffix,
        prefixes: Sequence[Prefix],
        mask: Sequence[bool],
        local_steps: int,
        seed: int,
        seconds: Seconds,
    ) -> None:
        self.suffix = suffix
        self.prefixes = list(prefixes)
        self.first = list(mask).index(True)
        self.local_steps = local_steps
        self.seed = seed
        self.seconds = seconds

    @property
    def nbytes(self) -> int:
        """Bytes of the cached hidden states."""
        return sum(prefix.nbytes for prefix in self.prefixes)

    def objective(self, round_: int, step: int) -> tuple[Evaluate, int]:
        """Returns the loss function of one local step and its number of examples.

        The batch is a function of (round, step) alone: a repeated plan measures the same.
        """
        prefix = pick(self.prefixes, (round_ - 1) * self.local_steps + step, self.seed)
        started = time.perf_counter()
        near = extend_prefix(prefix, list(self.suffix.blocks)[: self.first])
        self.seconds.steps += time.perf_counter() - started

        def evaluate(terms: NoiseTerms) -> float:
            started = time.perf_counter()
            loss = self.suffix.loss(near, self.first, terms)
            self.seconds.steps += time.perf_counter() - started
            return loss

        self.seconds.count += 1
        return one_by_one(evaluate), len(prefix.labels)


@dataclass(frozen=True)
class Score:
    """Accuracy and area under the ROC curve."""

    accuracy: float
    auc: float


class HeldOut:
    """The evaluation set, cached in front of the first trainable block."""

    def __init__(
        self,
        model: nn.Module,
        block: nn.Module,
        batches: Sequence[Sequence[Example]],
        on_batch: Callable[[], None],
    ) -> None:
        self.prefixes = []
        for batch in batches:
            self.prefixes.append(prefix_of(model, block, batch))
            on_batch()

    @torch.no_grad()
    def score(self, suffix: Suffix) -> Score:
        """Evaluates the unperturbed weights on every example."""
        logits = torch.cat([suffix.logits(prefix) for prefix in self.prefixes])
        return score_of(logits, torch.cat([prefix.labels for prefix in self.prefixes]))


def score_of(logits: Tensor, labels: Tensor) -> Score:
    """Returns the score of logits, float [n, 2], for labels 0 and 1, int64 [n]."""
    margin = logits[:, 1] - logits[:, 0]
    correct = (margin > 0) == (labels == 1)
    return Score(float(correct.float().mean()), area_under_curve(margin, labels))


def prefix_of(model: nn.Module, block: nn.Module, batch: Sequence[Example]) -> Prefix:
    """Runs the frozen part of the model on a batch."""
    return run_prefix(model, block, [e.ids for e in batch], [e.label for e in batch])


def area_under_curve(score: Tensor, labels: Tensor) -> float:
    """Returns the area under the ROC curve by ranks; ties count half.

    Args:
        score: Tensor  # [n]
        labels: Tensor  # [n], 1 for positives; both labels must occur
    """
    _, place, counts = torch.unique(score, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    rank = (ends - (counts.double() - 1) / 2)[place]
    positive = labels == 1
    p, n = int(positive.sum()), int((~positive).sum())
    return float((rank[positive].sum() - p * (p + 1) / 2) / (p * n))
