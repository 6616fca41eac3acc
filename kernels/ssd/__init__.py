"""The recurrence of Mamba-2, state-space duality (arXiv 2405.21060)."""

from zoo.kernels.ssd.op import CHUNK, flops, ssd

__all__ = ["CHUNK", "flops", "ssd"]
