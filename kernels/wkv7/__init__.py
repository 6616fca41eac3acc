"""The recurrence of RWKV-7 (arXiv 2503.14456)."""

from zoo.kernels.wkv7.op import CHUNK, flops, wkv7

__all__ = ["CHUNK", "flops", "wkv7"]
