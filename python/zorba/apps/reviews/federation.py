"""The federation on film reviews: what its clients measure, and all parts up to the first round."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import zorba_kernels as zk
from zorba.apps.reviews.data import Example, Reviews, balanced_batches, pick
from zorba.apps.reviews.settings import OWN_REPLICA, ReviewSettings
from zorba.federated import Client, FederationSettings, Replica, model_fingerprint
from zorba.hf import Block, Prefix, extend_prefix, find_blocks, run_prefix, run_suffix
from zorba.optim import Evaluate, ScratchPlacement
from zorba.optim.fused import FusedPlacement
from zorba.optim.own import BothSigns
from zorba.optim.placement import Placement
from zorba.optim.terms import Terms
from zorba.planning import BlockPlan, MemoryModel, model_weights_memory, plan_blocks


class Score(NamedTuple):
    """Accuracy and area under the ROC curve."""

    accuracy: float
    auc: float

    @staticmethod
    def of(logits: Tensor, labels: Tensor) -> Score:
        """Returns the score of logits, float [n, 2], for labels, int64 [n]; both must occur."""
        margin, positive = logits[:, 1] - logits[:, 0], labels == 1
        # The area is the share of (positive, negative) pairs in the right order; ties count half.
        ahead = margin[positive][:, None] - margin[~positive]
        wins = torch.heaviside(ahead, ahead.new_tensor(0.5)).double()
        return Score(float(((margin > 0) == positive).float().mean()), float(wins.mean()))


class Suffix:
    """The trainable end of a model: its last blocks, the norm and two rows of the head."""

    def __init__(
        self,
        model: Any,  # a causal language model with a final norm ``model.model.norm``
        blocks: Sequence[Block],  # its last ones, which are trained
        answers: Sequence[int],  # token ids of the words of label 0 and 1
        distribution: str,  # of the noise
    ) -> None:
        self.blocks = nn.ModuleList(block.module for block in blocks)
        self.norm = model.model.norm
        # Two rows of the head, frozen: no logits of words that nobody asks for.
        self.head = model.get_output_embeddings().weight.detach()[list(answers)].clone()
        # Noise is keyed by the names that the parameters have in the whole model.
        groups = {name: b for b, block in enumerate(blocks) for name in block.parameters}
        named = zip(groups, self.blocks.parameters(), strict=True)
        self.table = zk.ParamTable(named, groups=groups, num_groups=len(blocks))
        kind = FusedPlacement if distribution == "rank1" else ScratchPlacement
        self.placement: Placement = kind(self.blocks, self.table, distribution)
        self._both_signs = BothSigns(self.placement, lambda: False)  # blocks have no dropout

    def logits(self, prefix: Prefix, first: int = 0) -> Tensor:
        """Returns float32 [batch, 2] for a prefix in front of trainable block ``first``."""
        return run_suffix(prefix, list(self.blocks)[first:], self.norm, self.head)

    @torch.no_grad()
    def losses(self, prefix: Prefix, first: int, noises: Sequence[Terms]) -> list[Any]:
        """Returns the cross-entropy over the two answers at the weights plus each of the noises.

        Of each sentence: float64 arrays [batch].
        """

        def closure(prefix: Prefix = prefix) -> Any:
            logits = self.logits(prefix, first)
            each = nn.functional.cross_entropy(logits, prefix.labels, reduction="none")
            return each.double().numpy()

        def losses_at(noises: Sequence[Terms], other: Callable[[], Any] = closure) -> list[Any]:
            found = []
            for terms in noises:
                self.placement.move_to(terms)
                found.append(other())
            return found

        with self.placement.session():
            return self._both_signs(losses_at, noises, closure, prefix)

    @torch.no_grad()
    def score(self, prefixes: Sequence[Prefix]) -> Score:
        """Returns the score of the unperturbed weights on an evaluation set."""
        logits = torch.cat([self.logits(prefix) for prefix in prefixes])
        return Score.of(logits, torch.cat([prefix.labels for prefix in prefixes]))


@dataclass(frozen=True)
class Pool:
    """A client's cached batches, and the objective that its federated client calls.

    The frozen blocks in front of the trainable ones run once for the whole fine-tune, and the
    trainable blocks in front of the client's first active one once a step for all perturbations.
    """

    suffix: Suffix  # of the replica that the client works on
    prefixes: list[Prefix]  # its batches in front of the first trainable block
    first: int  # of the trainable blocks that the client activates
    local_steps: int  # K, of a round; each takes the next batch
    seed: int  # of the order of its batches

    def objective(self, round_: int, step: int) -> tuple[Evaluate, int]:
        """Returns the loss function of one local step and its number of examples."""
        # The batch is a function of round and step, and no counter: after a lost message the server
        # asks for the same step again, and must get the same scalars.
        prefix = pick(self.prefixes, (round_ - 1) * self.local_steps + step, self.seed)
        near = extend_prefix(prefix, list(self.suffix.blocks)[: self.first])
        return partial(self.suffix.losses, near, self.first), len(prefix.labels)


@dataclass(frozen=True)
class Federation:
    """Model, data and clients of a run; the server is made by whoever runs it."""

    settings: FederationSettings  # of the server
    plan: BlockPlan  # which client activates which blocks
    suffixes: dict[str, Suffix]  # trainable blocks by replica: ``shared``, and OWN_REPLICA's
    replicas: dict[str, Replica]  # over them, by the same names
    pools: dict[str, Pool]  # of each client
    clients: dict[str, Client]  # by name
    held_out: list[Prefix]  # the evaluation set in front of the first trainable block

    def score(self, replica: str = "shared") -> Score:
        """Returns the score of the held-out set at a replica's weights."""
        return self.suffixes[replica].score(self.held_out)


def prefixes_of(
    model: nn.Module, block: nn.Module, batches: Iterable[Sequence[Example]]
) -> list[Prefix]:
    """Runs the blocks in front of a block on batches."""
    return [run_prefix(model, block, [e.ids for e in b], [e.label for e in b]) for b in batches]


def room_for_blocks(
    model: nn.Module, blocks: Sequence[Block], counts: Mapping[str, int]
) -> tuple[MemoryModel, dict[str, int]]:
    """Returns the memory that blocks of one size take, and budgets that fit each client's count.

    The blocks wait on the host while they are idle. In a federation in one process all blocks are
    resident, so there these budgets shape the plan and measure nothing.
    """
    memory = model_weights_memory(model, blocks, idle="offload")
    # Half a block more than the count: a budget to the byte would hang on rounding.
    halves = {name: 2 * min(count, len(blocks)) + 1 for name, count in counts.items()}
    room = blocks[0].nbytes
    return memory, {name: memory.fixed + half * room // 2 for name, half in halves.items()}


def build(
    settings: ReviewSettings, model: Any, reviews: Reviews, console: Console | None = None
) -> Federation:
    """Caches the frozen prefixes of a causal model, and makes the plan, replicas and clients."""
    blocks = find_blocks(model)
    if settings.trainable > len(blocks):
        raise ValueError(f"trainable is {settings.trainable}; the model has {len(blocks)} blocks")
    trained = blocks[-settings.trainable :]
    plan = plan_blocks(*room_for_blocks(model, trained, settings.clients))
    # One client has weights of its own, so that equal fingerprints at the end say something. The
    # others share a replica: eight copies would show no more, and take eight times the memory.
    origin, law = model_fingerprint(model.named_parameters()), settings.distribution
    copies = [replace(block, module=copy.deepcopy(block.module)) for block in trained]
    suffixes = {
        name: Suffix(model, own, reviews.answers, law)
        for name, own in (("shared", trained), (OWN_REPLICA, copies))
    }
    replicas = {key: Replica(suffix.table, origin, law) for key, suffix in suffixes.items()}
    batches = {
        name: balanced_batches(examples, settings.pool, settings.batch_size)
        for name, examples in reviews.clients.items()
    }
    every = [*(batch for own in batches.values() for batch in own), *reviews.evaluation]
    shown = track(every, "frozen prefix", console=console)
    prefixes = iter(prefixes_of(model, trained[0].module, shown))
    pools, clients = {}, {}
    for n, (name, own) in enumerate(batches.items()):
        key = name if name == OWN_REPLICA else "shared"
        mine, first = list(islice(prefixes, len(own))), int(plan.mask[n].argmax())
        # Each client goes through its batches in an order of its own.
        order = settings.seed * 1000 + n
        pools[name] = Pool(suffixes[key], mine, first, settings.local_steps, order)
        clients[name] = Client(name, replicas[key], pools[name].objective, by_row=law == "rank1")
    server = FederationSettings(
        job="demo",
        seed=settings.seed,
        lr=lambda round_number: settings.lr * (1 - (round_number - 1) / settings.rounds),
        num_perturbations=settings.perturbations,
        local_steps=settings.local_steps,
        eps=settings.eps,
        distribution=law,
        directions=settings.directions,
        clip=settings.clip,
        weighting="uniform",
    )
    return Federation(server, plan, suffixes, replicas, pools, clients, list(prefixes))
