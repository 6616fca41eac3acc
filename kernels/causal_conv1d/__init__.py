"""Causal depthwise convolution over a few steps, with carried state and segment boundaries."""

from zoo.kernels.causal_conv1d.op import causal_conv1d, flops

__all__ = ["causal_conv1d", "flops"]
