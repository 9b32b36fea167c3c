"""Prefix reuse and key-value caches: positions of a cache that skipped blocks did not fill."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zorba import ZerothOrderSGD

from tests.optim.test_reuse import tiny


def test_a_key_value_cache_of_the_caller_is_no_prefix(rng: Any) -> None:
    """Positions in a cache were made by earlier forwards, which reuse knows nothing of."""
    from transformers import DynamicCache

    ids = torch.randint(1, 100, (2, 6), generator=rng.generator)

    def scalars(reuse: bool) -> Any:
        model = tiny("llama", rng).eval()
        optimizer = ZerothOrderSGD(model, lr=1e-2, blocks="last:1", prefix_reuse=reuse)

        def closure() -> Tensor:
            cache = DynamicCache(config=model.config)
            model(input_ids=ids[:, :3], past_key_values=cache)
            out = model(input_ids=ids[:, 3:], past_key_values=cache)
            return out.logits.square().mean()

        optimizer.step(closure)
        return optimizer.last_step.scalars

    with pytest.warns(UserWarning, match="prefix reuse is switched off"):
        reused = scalars(reuse=True)
    assert reused == scalars(reuse=False)


def test_generation_in_a_closure(rng: Any) -> None:
    """An objective of generated text: its key-value cache must hold every block's positions."""
    ids = torch.randint(1, 100, (2, 6), generator=rng.generator)

    def scalars(reuse: bool) -> Any:
        model = tiny("llama", rng).eval()
        optimizer = ZerothOrderSGD(model, lr=1e-2, eps=1.0, blocks="last:1", prefix_reuse=reuse)

        def closure() -> Tensor:
            out = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=-1)
            return out[:, 6:].float().mean()

        optimizer.step(closure)
        return optimizer.last_step.scalars

    with pytest.warns(UserWarning, match="prefix reuse is switched off"):
        reused = scalars(reuse=True)
    assert reused == scalars(reuse=False)
