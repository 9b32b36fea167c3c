"""A federation over several machines, on NVIDIA FLARE: see ``docs/deployment.md``.

Nothing here imports torch before a site or the server needs it: the processes that only start and
watch others stay small.
"""
