"""Triton code of the primitive, a file an op; ``zorba_kernels.backends.triton`` launches it.

Only that backend imports what is in here: the package works without triton.
"""
