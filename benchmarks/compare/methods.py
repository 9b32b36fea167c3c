"""The methods of the comparison: the peers, and ZorBA's own server, clients, messages and log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from zorba.federated import (
    Client,
    FederationSettings,
    ModelObjective,
    Replica,
    Server,
    decode,
    model_fingerprint,
)
from zorba.hf import find_blocks
from zorba.planning import BlockPlan, model_weights_memory, plan_blocks
from zorba.tables import DeviceTables

from benchmarks.compare.settings import PLANS, Settings
from benchmarks.peers.decomfl import DeComFL
from benchmarks.peers.fedavg_lora import FedAvgLora
from benchmarks.peers.fedkseed import FedKSeed
from benchmarks.peers.method import Message, Method, Work
from benchmarks.peers.mezo import SingleMachine

SEED_BYTES = 8
Masks = Mapping[str, Sequence[bool]]


def plan_masks(model: Any, shares: Mapping[str, float]) -> BlockPlan:
    """Plans which blocks a client activates; its budget has room for its share of them."""
    blocks = find_blocks(model)
    memory = model_weights_memory(model, idle="offload")
    budgets = {
        name: memory.fixed + int(share * len(blocks) + 0.5) * blocks[0].nbytes
        for name, share in shares.items()
    }
    return plan_blocks(memory, budgets)


@dataclass
class Zorba:
    """Server and clients on one shared replica; see ``benchmarks.peers.method.Method``.

    Transformer blocks are trained; embeddings, norm and head are frozen. Each client measures a
    direction of its own, of rank one.
    """

    work: Work
    masks: Masks  # which blocks each client activates, bool [blocks] by client
    lr: float
    folder: Path  # for the log
    eps: float = 1e-3
    local_steps: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        model = self.work.model
        groups = {p: b for b, block in enumerate(find_blocks(model)) for p in block.parameters}
        named = dict(model.named_parameters())
        table = DeviceTables({name: named[name] for name in groups}, groups)
        self.replica = Replica(table, model_fingerprint(named.items()), "rank1")
        names = list(self.work.sizes)
        objectives = {name: self._objective(name, table) for name in names}
        self.clients = {
            name: Client(name, self.replica, objective, by_row=objective.by_row)
            for name, objective in objectives.items()
        }
        settings = FederationSettings(
            "compare", self.seed, self.lr, local_steps=self.local_steps, eps=self.eps,
            num_perturbations=1, distribution="rank1", weighting="uniform",
        )  # fmt: skip
        masks = np.array([list(self.masks[name]) for name in names])
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "zorba.log"
        log.unlink(missing_ok=True)  # a run starts at the base model
        self.server = Server(settings, self.replica.identity, names, masks, log)
        self._hellos: dict[str, int] = {}  # bytes of those that no reply has counted yet

    def begin(self, round_: int, clients: Sequence[str]) -> dict[str, Message]:
        known = self.server.fingerprints
        began = self.server.begin_round(clients)
        greetings = {name: data for name, data in began.items() if name not in known}
        for name, greeting in greetings.items():
            hello = self.clients[name].handle(greeting)
            self.server.receive(name, hello)
            self._hellos[name] = len(hello)
        messages = {}
        for name, data in self.server.begin_round(clients).items():
            plan: Any = decode(data)
            entries = sum(entry.scalar_bytes for entry in plan.entries)
            numbers = entries + SEED_BYTES * len(plan.seeds)
            frame = len(data) + len(greetings.get(name, b"")) - numbers
            messages[name] = Message(data, numbers, frame=frame)
        return messages

    def local(self, client: str, round_: int, message: Message) -> Message:
        data = self.clients[client].handle(message.content)
        reply: Any = decode(data)
        scalars = reply.scalars.nbytes
        frame = len(data) + self._hellos.pop(client, 0) - scalars
        return Message(data, scalars, reply.loss, frame)

    def aggregate(self, round_: int, replies: Mapping[str, Message]) -> None:
        """The log entry. Clients get it with the next plan; it is applied now."""
        for name, reply in replies.items():
            receipt = self.server.receive(name, reply.content)
            if not receipt.accepted:
                raise RuntimeError(f"{name} was refused in round {round_}: {receipt.reason}")
        self.replica.apply([self.server.end_round().entry])

    def _objective(self, client: str, table: DeviceTables) -> ModelObjective:
        def batches(round_: int, step: int) -> tuple[Any, int]:
            batch = self.work.batch(client, round_, step)
            return batch, len(batch.labels)

        each = self.work.losses
        return ModelObjective(
            self.work.model, table, batches, each or self.work.loss, "rank1",
            per_example=each is not None,
        )  # fmt: skip


METHODS: Mapping[str, Any] = {
    "zorba": Zorba, "fedavg-lora": FedAvgLora, "decomfl": DeComFL, "fedkseed": FedKSeed,
    "mezo": SingleMachine,
}  # fmt: skip


def make_method(name: str, work: Work, settings: Settings, masks: Masks, **options: Any) -> Method:
    """Returns a method on a replica of the original weights; only ZorBA has ``masks``."""
    plan, kind = PLANS[name], METHODS[name]
    common = {
        "seed": settings.seed, "eps": settings.eps, "local_steps": plan.local_steps,
        "masks": masks, "folder": settings.out,
    }  # fmt: skip
    taken = {key: common[key] for key in common.keys() & {field.name for field in fields(kind)}}
    method: Method = kind(work=work, **{**taken, **plan.options, **options})
    return method
