"""Landmark attention: blocks of tokens, each reached through the weight that a query gives to its last token."""

from zoo.kernels.landmark_attention.op import flops, landmark_attention

__all__ = ["flops", "landmark_attention"]
