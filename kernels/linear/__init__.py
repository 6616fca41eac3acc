"""Dense projections by the fastest product of the machine; see README.md."""

from zoo.kernels.linear.op import flops, linear

__all__ = ["flops", "linear"]
