"""What the state-space models share: settings, and the initial step sizes (arXiv 2312.00752, section 3.6)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.config import ModelConfig
from zoo.settings import setting


@dataclass(kw_only=True)
class StateSpaceConfig(ModelConfig):
    """Settings of the Mamba family; the defaults are the published ones."""

    d_conv: int = setting(4, "taps of the short convolution", minimum=1)
    short_conv: bool = setting(True, "the short convolution in front of the recurrence")
    expand: int = setting(2, "inner width over d_model", minimum=1)
    dt_min: float = setting(1e-3, "smallest initial step size", above=0)
    dt_max: float = setting(1e-1, "largest initial step size", above=0)
    dt_floor: float = setting(1e-4, "no initial step size lies below this", above=0)
    backend: str = setting("auto", "kernel backend: auto, or one that `python -m zoo.kernels` lists")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dt_max < self.dt_min:
            self.fail("dt_max", f"expected at least dt_min={self.dt_min:g}")

    def step_size_bias(self, count: int) -> Tensor:
        """Biases whose softplus is log-uniform in [dt_min, dt_max]; (count,)."""
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        dt = torch.empty(count).uniform_(low, high).exp().clamp(min=self.dt_floor)
        return dt + torch.log(-torch.expm1(-dt))
