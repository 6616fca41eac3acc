"""The local mixing in front of RWKV's projections: each token interpolated with the one before it."""

from zoo.kernels.token_shift.op import flops, token_shift

__all__ = ["flops", "token_shift"]
