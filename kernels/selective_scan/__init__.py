"""The selective scan of Mamba-1 (arXiv 2312.00752)."""

from zoo.kernels.selective_scan.op import CHUNK, flops, selective_scan

__all__ = ["CHUNK", "flops", "selective_scan"]
