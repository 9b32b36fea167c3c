"""Idle blocks off the device: their weights wait on the host and pass through two buffers."""

from zorba.offload.offload import Offload

__all__ = ["Offload"]
