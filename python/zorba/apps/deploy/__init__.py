"""A federation over several machines, on NVIDIA FLARE: see ``docs/deployment.md``.

Nothing that a supervisor imports loads torch: the processes that only start and watch others stay
small.
"""
