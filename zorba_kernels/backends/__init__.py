"""Backends of the primitive; ``reference`` is the oracle that the others equal bit for bit.

Importing this package registers them, the most preferred first.
"""

from zorba_kernels import dispatch
from zorba_kernels.backends import cpu, cuda, reference, triton

# Compiled code before Triton, which compiles at its first use; the slow oracle as a last resort.
for _module in (cuda, triton, cpu, reference):
    dispatch.register(_module.BACKEND)
