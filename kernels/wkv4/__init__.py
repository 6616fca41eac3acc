"""The attention-free mixing of RWKV-4 (arXiv 2305.13048)."""

from zoo.kernels.wkv4.op import CHUNK, flops, wkv4, wkv4_initial_state

__all__ = ["CHUNK", "flops", "wkv4", "wkv4_initial_state"]
