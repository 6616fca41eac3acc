"""Devices by name."""

from __future__ import annotations

import torch

from zoo.kernels.errors import ConfigError


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: There is none here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" makes tensors, but they hold nothing
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ConfigError(f"device={str(name)!r} cannot be used here: pass device=cpu") from error
    return device
