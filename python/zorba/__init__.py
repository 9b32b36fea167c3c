"""Zeroth-order fine-tuning of language models, alone or as a federation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zorba.hf.trainer import ZOArguments, ZOTrainer
    from zorba.optim import ZerothOrderSGD

__all__ = ["ZOArguments", "ZOTrainer", "ZerothOrderSGD"]


def __getattr__(name: str) -> Any:
    """Imports a class when it is asked for: torch and transformers are slow to load."""
    if name == "ZerothOrderSGD":
        from zorba import optim

        return optim.ZerothOrderSGD
    if name in ("ZOTrainer", "ZOArguments"):
        from zorba.hf import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'zorba' has no attribute {name!r}")
