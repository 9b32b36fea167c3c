"""FedIT: FedAvg over LoRA adapters, trained locally with AdamW (arXiv 2305.05644).

Algorithm 1, on PEFT's LoRA and torch's AdamW. The base model stays frozen. In each round the server
sends the global adapter; a client trains it on its own data with an optimizer of its own that
starts anew, and sends it back; the server takes the mean, each client weighted by its number of
examples. Rank, targets, dropout and learning rate are those of the authors' code (Shepherd).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from benchmarks.peers.in_place import seed_of
from benchmarks.peers.method import Message, Work, bare

Adapter = dict[str, Tensor]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class FedAvgLora:
    """Server and clients on one shared replica; see ``benchmarks.peers.method.Method``.

    Args:
        work: model and data; LoRA layers are put into the model.
        lr: of AdamW.
        local_steps: AdamW steps of a client and round.
        rank: of the adapters; their scale is ``alpha / rank``.
        alpha: see ``rank``.
        dropout: in front of the adapters while training.
        checkpointing: recompute activations in the backward pass instead of keeping them.
        seed: of the adapters' start and of dropout.
    """

    def __init__(
        self,
        work: Work,
        lr: float = 3e-4,
        local_steps: int = 4,
        rank: int = 8,
        alpha: int = 16,
        dropout: float = 0.05,
        checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        self.work, self.lr, self.local_steps, self.seed = work, lr, local_steps, seed
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(TARGETS)
        )
        self.model: Any = get_peft_model(work.model, config).eval()  # type: ignore[arg-type]
        if checkpointing:
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.adapter = self._copy()

    def begin(self, round_: int, clients: Sequence[str]) -> dict[str, Message]:
        """See ``Method``: the global adapter."""
        return {client: bare(self.adapter, nbytes(self.adapter)) for client in clients}

    def local(self, client: str, round_: int, message: Message) -> Message:
        """See ``Method``: some steps of AdamW on the adapter."""
        self._load(message.content)
        torch.manual_seed(seed_of(self.seed, round_, *client.encode()))  # of dropout
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0)
        losses = []
        self.model.train()
        for step in range(self.local_steps):
            optimizer.zero_grad()
            loss = self.work.loss(self.work.batch(client, round_, step))
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        self.model.eval()
        optimizer.zero_grad()
        adapter = self._copy()
        self._load(self.adapter)
        return bare(adapter, nbytes(adapter), sum(losses) / len(losses))

    def aggregate(self, round_: int, replies: Mapping[str, Message]) -> None:
        """See ``Method``: the mean of the adapters, weighted by the clients' examples."""
        total = sum(self.work.sizes[client] for client in replies)
        mean = {name: torch.zeros_like(value) for name, value in self.adapter.items()}
        for client, reply in replies.items():
            for name, value in reply.content.items():
                mean[name] += value * (self.work.sizes[client] / total)
        self.adapter = mean
        self._load(self.adapter)

    def state(self) -> Any:
        """See ``Method``: the global adapter."""
        return self.adapter

    def restore(self, state: Any) -> None:
        """See ``Method``."""
        self.adapter = state
        self._load(state)

    def _copy(self) -> Adapter:
        state: Adapter = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return {name: value.detach().clone() for name, value in state.items()}

    def _load(self, adapter: Adapter) -> None:
        set_peft_model_state_dict(self.model, adapter)


def nbytes(adapter: Adapter) -> int:
    """Returns the bytes of all tensors of an adapter."""
    return sum(value.numel() * value.element_size() for value in adapter.values())
