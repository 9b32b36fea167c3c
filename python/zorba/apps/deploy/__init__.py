"""A federation over several machines, on NVIDIA FLARE: see ``docs/deployment.md``."""
