"""Torch's random state when a step began, to be repeated for each evaluation."""

from __future__ import annotations

import torch


class GeneratorState:
    """The state of the generators that dropout draws from on a device, and on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._device = device if device.type == "cuda" else None
        self._cuda = torch.cuda.get_rng_state(device) if self._device else None

    def rewind(self) -> None:
        """Brings the generators back to it."""
        torch.set_rng_state(self._cpu)
        if self._device is not None and self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
