"""FedIT: FedAvg over LoRA adapters, trained locally with AdamW (arXiv 2305.05644).

Algorithm 1, on PEFT's LoRA and torch's AdamW. The base model stays frozen. In each round the server
sends the global adapter; a client trains it on its own data with an optimizer of its own that
starts anew, and sends it back; the server takes the mean, each client weighted by its number of
examples. Rank, targets, dropout and learning rate are those of the authors' code (Shepherd).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from benchmarks.peers.method import Message, Work, seed_of

Adapter = dict[str, Tensor]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass
class FedAvgLora:
    """Server and clients on one shared replica; see ``benchmarks.peers.method.Method``."""

    work: Work  # LoRA layers are put into its model
    lr: float = 3e-4
    local_steps: int = 4
    rank: int = 8  # the scale of the adapters is alpha / rank
    alpha: int = 16
    dropout: float = 0.05  # in front of the adapters while training
    checkpointing: bool = False  # recompute activations in the backward pass
    seed: int = 0  # of the adapters' start and of dropout

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=TARGETS
        )
        self.model: Any = get_peft_model(self.work.model, config).eval()  # type: ignore[arg-type]
        if self.checkpointing:
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.adapter = self._copy()

    def begin(self, round_: int, clients: Sequence[str]) -> dict[str, Message]:
        return {client: _message(self.adapter) for client in clients}

    def local(self, client: str, round_: int, message: Message) -> Message:
        set_peft_model_state_dict(self.model, message.content)
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
        set_peft_model_state_dict(self.model, self.adapter)
        return _message(adapter, sum(losses) / len(losses))

    def aggregate(self, round_: int, replies: Mapping[str, Message]) -> None:
        mean = {name: torch.zeros_like(value) for name, value in self.adapter.items()}
        for client, share in self.work.shares(replies).items():
            for name, value in replies[client].content.items():
                mean[name] += value * share
        self.adapter = mean
        set_peft_model_state_dict(self.model, mean)

    def _copy(self) -> Adapter:
        state: Adapter = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return {name: value.detach().clone() for name, value in state.items()}


def _message(adapter: Adapter, loss: float = float("nan")) -> Message:
    return Message(adapter, sum(value.nbytes for value in adapter.values()), loss)
