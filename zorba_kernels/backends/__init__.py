"""Backends of the primitive; ``reference`` is the oracle that the others equal bit for bit.

Importing this package registers them, the most preferred first.
"""

from zorba_kernels import dispatch
from zorba_kernels.backends import cpu, cuda, reference, triton

for _module in (cuda, triton, cpu, reference):
    dispatch.register(_module.BACKEND)
