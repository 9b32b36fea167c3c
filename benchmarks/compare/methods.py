"""The methods of the comparison: the peers, and ZorBA's own server, clients, messages and log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

from benchmarks.compare.settings import Settings
from benchmarks.peers.decomfl import DeComFL
from benchmarks.peers.fedavg_lora import FedAvgLora
from benchmarks.peers.fedkseed import FedKSeed
from benchmarks.peers.method import Message, Method, Work
from benchmarks.peers.single_machine import SingleMachine

_SEED_BYTES = 8


def plan_masks(model: Any, shares: Mapping[str, float]) -> BlockPlan:
    """Plans which client activates which block; idle blocks are off the device.

    Args:
        model: whose transformer blocks are planned; the rest is frozen, and resident.
        shares: of the blocks, that fit the budget of each client.
    """
    blocks = find_blocks(model)
    memory = model_weights_memory(model, idle="offload")
    budgets = {
        name: base + int(share * len(blocks) + 0.5) * blocks[0].nbytes
        for (name, share), base in zip(
            shares.items(), memory.fixed_bytes(list(shares)), strict=True
        )
    }
    return plan_blocks(memory, budgets)


class Zorba:
    """Server and clients on one shared replica; see ``benchmarks.peers.method.Method``.

    Args:
        work: model and data. Transformer blocks are trained; embeddings, norm and head are frozen.
        masks: which blocks each client activates, bool [blocks] by client.
        lr: learning rate.
        folder: for the log.
        eps: distance of the central differences.
        local_steps: K.
        perturbations: P.
        seed: of the job.
    """

    def __init__(
        self,
        work: Work,
        masks: Mapping[str, Sequence[bool]],
        lr: float,
        folder: Path,
        eps: float = 1e-3,
        local_steps: int = 1,
        perturbations: int = 1,
        seed: int = 0,
    ) -> None:
        self.work = work
        groups = {p: b for b, block in enumerate(find_blocks(work.model)) for p in block.parameters}
        named = dict(work.model.named_parameters())
        table = DeviceTables({name: named[name] for name in groups}, groups)
        self.replica = Replica(table, model_fingerprint(named.items()), "rademacher")
        self.clients = {
            name: Client(name, self.replica, self._objective(name, table)) for name in work.clients
        }
        self._settings = FederationSettings(
            job="compare",
            seed=seed,
            lr=lr,
            num_perturbations=perturbations,
            local_steps=local_steps,
            eps=eps,
            distribution="rademacher",
            weighting="uniform",
        )
        self._masks = np.array([list(masks[name]) for name in work.clients])
        self._log = folder / "zorba.log"
        folder.mkdir(parents=True, exist_ok=True)
        self._log.unlink(missing_ok=True)  # a run starts at the base model, or with restore()
        self.server = self._start()
        self._hellos: dict[str, int] = {}

    def begin(self, round_: int, clients: Sequence[str]) -> dict[str, Message]:
        """See ``Method``: a plan each; clients that the server does not know are greeted before."""
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
            assert plan.round == round_
            entries = sum(entry.scalar_bytes for entry in plan.entries)
            encoded = len(data) + len(greetings.get(name, b""))
            messages[name] = Message(data, entries + _SEED_BYTES * len(plan.seeds), encoded)
        return messages

    def local(self, client: str, round_: int, message: Message) -> Message:
        """See ``Method``: scalars of the client's own blocks; the replica is only read."""
        data = self.clients[client].handle(message.content)
        reply: Any = decode(data)
        encoded = len(data) + self._hellos.pop(client, 0)
        return Message(data, reply.scalars.nbytes, encoded, reply.loss)

    def aggregate(self, round_: int, replies: Mapping[str, Message]) -> None:
        """See ``Method``: the log entry. Clients get it with the next plan; it is applied now."""
        for name, reply in replies.items():
            receipt = self.server.receive(name, reply.content)
            if not receipt.accepted:
                raise RuntimeError(f"{name} was refused in round {round_}: {receipt.reason}")
        self.replica.apply([self.server.end_round().entry])

    def state(self) -> Any:
        """See ``Method``: the log."""
        return self._log.read_bytes()

    def restore(self, state: Any) -> None:
        """See ``Method``."""
        self.server.close()
        self._log.write_bytes(state)
        self.server = self._start()
        self.replica.bind(self._settings.job_id)
        # The last entry rides on the next plan, as it would have.
        self.replica.apply(list(self.server.log.entries(1))[:-1])

    def _start(self) -> Server:
        return Server(
            self._settings, self.replica.identity, self.work.clients, self._masks, self._log
        )

    def _objective(self, client: str, table: DeviceTables) -> ModelObjective:
        def batches(round_: int, step: int) -> tuple[Any, int]:
            batch = self.work.batch(client, round_, step)
            return batch, len(batch.labels)

        return ModelObjective(self.work.model, table, batches, self.work.loss, "rademacher")


METHODS: Mapping[str, Any] = {
    "zorba": Zorba,
    "fedavg-lora": FedAvgLora,
    "decomfl": DeComFL,
    "fedkseed": FedKSeed,
    "mezo": SingleMachine,
}


def make_method(
    name: str, work: Work, settings: Settings, masks: Mapping[str, Sequence[bool]]
) -> Method:
    """Returns a method on a replica of the original weights.

    Args:
        name: of the method, a key of ``settings.methods``.
        work: model and data.
        settings: of the comparison.
        masks: blocks that each client activates: ZorBA's, no other method has them.
    """
    plan = settings.methods[name]
    options: dict[str, Any] = {"seed": settings.seed, **plan.options}
    if name != "fedavg-lora":
        options["eps"] = settings.eps
    if name != "mezo":
        options["local_steps"] = plan.local_steps
    if name == "zorba":
        options |= {"masks": masks, "folder": settings.out}
    method: Method = METHODS[name](work, **options)
    return method
