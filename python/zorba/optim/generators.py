"""Random state when a step began, to be repeated for each evaluation."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


class GeneratorState:
    """The state of every generator that a forward may draw from.

    Torch's on the CPU and on a device (dropout), Python's, and numpy's where it is in use (masks of
    speech models).
    """

    # Both losses of a difference need the same dropout masks. With others the difference would be
    # that of two subnetworks, divided by a small eps: noise a hundred times the signal.

    def __init__(self, device: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._device = device if device.type == "cuda" else None
        self._cuda = torch.cuda.get_rng_state(device) if self._device else None
        self._python = random.getstate()
        # Not imported for this: where nobody has imported it, nobody draws from it.
        self._numpy: Any = sys.modules.get("numpy")
        self._numpy_state = None if self._numpy is None else self._numpy.random.get_state()

    def rewind(self) -> None:
        """Brings the generators back to it."""
        torch.set_rng_state(self._cpu)
        if self._device is not None and self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
        random.setstate(self._python)
        if self._numpy is not None:
            self._numpy.random.set_state(self._numpy_state)
