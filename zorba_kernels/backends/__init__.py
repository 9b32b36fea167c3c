"""Backends of the primitive.

Each module has ``unavailable``, ``add_noise``, ``noise`` and ``fingerprint``; ``reference`` is the
oracle that the others equal bit for bit.
"""
