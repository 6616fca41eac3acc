"""Operators: pure functions on tensors, one folder each, several backends behind one signature.

Importing this package loads no compiler: numba, Triton and the CUDA packages are imported when a call first needs them.
"""

from zoo.kernels.backends import describe, used
from zoo.kernels.selective_scan import selective_scan

__all__ = ["describe", "selective_scan", "used"]
