"""Zeroth-order fine-tuning of language models, alone or as a federation."""

from zorba.optim import ZerothOrderSGD

__all__ = ["ZerothOrderSGD"]
