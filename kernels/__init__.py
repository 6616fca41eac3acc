"""Operators: pure functions on tensors, one folder each, several backends behind one signature.

Importing this package loads no compiler: numba, Triton and the CUDA packages are imported when a call first needs them.
"""

from zoo.kernels.backends import describe, used
from zoo.kernels.causal_conv1d.op import causal_conv1d
from zoo.kernels.causal_conv1d.op import flops as causal_conv1d_flops
from zoo.kernels.selective_scan.op import flops as selective_scan_flops
from zoo.kernels.selective_scan.op import selective_scan

__all__ = [
    "causal_conv1d",
    "causal_conv1d_flops",
    "describe",
    "selective_scan",
    "selective_scan_flops",
    "used",
]
