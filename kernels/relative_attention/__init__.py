"""Softmax attention of segments to themselves and to a memory, with the relative positions of Transformer-XL."""

from zoo.kernels.relative_attention.op import flops, relative_attention
from zoo.kernels.relative_attention.segments import Segments

__all__ = ["Segments", "flops", "relative_attention"]
