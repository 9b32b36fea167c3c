"""Zeroth-order fine-tuning of language models, alone or as a federation."""

from typing import Any

from zorba.optim import ZerothOrderSGD

__all__ = ["ZOArguments", "ZOTrainer", "ZerothOrderSGD"]


def __getattr__(name: str) -> Any:
    """Imports what needs transformers when it is asked for."""
    if name in ("ZOTrainer", "ZOArguments"):
        from zorba.hf import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'zorba' has no attribute {name!r}")
