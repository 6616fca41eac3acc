"""How to train on a dataset where the settings leave it open. The same for every architecture, so that they compare."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a dataset recommends.

    Attributes:
        max_steps: optimiser steps after which a small model has learnt it.
        lr: peak learning rate.
    """

    max_steps: int = 2_000
    lr: float = 1e-3
