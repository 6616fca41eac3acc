"""Softmax attention over chosen keys: windows, documents, dilations, global and random blocks, caches."""

from zoo.kernels.sparse_attention.op import flops, sparse_attention
from zoo.kernels.sparse_attention.pattern import Pattern, visible_pairs
from zoo.kernels.sparse_attention.reference import dense_weights

__all__ = ["Pattern", "dense_weights", "flops", "sparse_attention", "visible_pairs"]
