"""The optimiser: which parameters decay, and the learning rate at each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from zoo.model import Model
from zoo.settings import Settings, setting

SCHEDULES = {
    "cosine": "warm-up, then half a cosine down to min_lr_ratio",
    "wsd": "warm-up, stable, then linear decay over the last decay_ratio of the steps",
    "constant": "warm-up, then constant",
}


@dataclass(kw_only=True)
class OptimConfig(Settings):
    """AdamW (arXiv 1711.05101) with a warm-up and a schedule, stepped once per optimiser step."""

    lr: float | None = setting(None, "peak learning rate; null: what dataset and architecture recommend", above=0)
    weight_decay: float = setting(0.1, "decay of matrices; norms, biases, embeddings and marked ones never", minimum=0)
    beta1: float = setting(0.9, "decay of the running mean of gradients", minimum=0, maximum=0.9999)
    beta2: float = setting(0.95, "decay of the running mean of squared gradients", minimum=0, maximum=0.9999)
    eps: float = setting(1e-8, "added to the root of the running mean of squares", above=0)
    clip: float | None = setting(1.0, "largest norm of the gradient; null: no clipping", above=0)
    schedule: str = setting("cosine", "; ".join(f"{k}: {v}" for k, v in SCHEDULES.items()), choices=tuple(SCHEDULES))
    warmup_steps: int = setting(100, "steps of linear warm-up, at most a tenth of all steps", minimum=0)
    decay_ratio: float = setting(0.2, "share of the steps in which wsd decays", above=0, maximum=1)
    min_lr_ratio: float = setting(0.0, "final learning rate over lr", minimum=0, maximum=1)


def parameter_groups(model: Model, config: OptimConfig) -> list[dict[str, object]]:
    """Splits the trainable parameters by weight decay and learning rate, as the mixers mark them.

    Returns:
        Groups for a torch optimiser, the names of their parameters under "names"; first those that decay and learn at
        the common rate.
    """
    no_decay, scales = model.no_weight_decay(), model.learning_rate_scales()
    assert config.lr is not None
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = (name in no_decay, scales.get(name, 1.0))
        decay = 0.0 if name in no_decay else config.weight_decay
        group = {"params": [], "names": [], "weight_decay": decay, "lr": config.lr * kind[1]}
        groups.setdefault(kind, group)["params"].append(parameter)
        groups[kind]["names"].append(name)
    return [groups[kind] for kind in sorted(groups)]


def learning_rate_factor(step: int, config: OptimConfig, max_steps: int) -> float:
    """The learning rate of an optimiser step, as a fraction of `config.lr`.

    Args:
        step: Optimiser steps taken before this one, from 0.
        config: Schedule and warm-up.
        max_steps: Length of the whole run; later steps keep the last value.
    """
    warmup = min(config.warmup_steps, max_steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    floor = config.min_lr_ratio
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    decay = min(max(1, round(config.decay_ratio * max_steps)), max_steps - warmup)
    progress = min(1.0, max(0.0, (step - (max_steps - decay)) / max(1, decay)))
    return 1 - (1 - floor) * progress


def build_optimizer(model: Model, config: OptimConfig, max_steps: int, *, fused: bool) -> tuple[AdamW, LambdaLR]:
    """AdamW over the parameter groups and its schedule.

    Args:
        model: The model.
        config: Settings, with `lr` decided.
        max_steps: Length of the whole run.
        fused: One kernel for all parameters; not with a gradient scaler, which must unscale before clipping.
    """
    assert config.lr is not None
    groups = parameter_groups(model, config)
    optimizer = AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused)
    return optimizer, LambdaLR(optimizer, lambda step: learning_rate_factor(step, config, max_steps))


def first_nonfinite_gradient(model: nn.Module) -> str | None:
    """Name of the parameter where a backward pass first met an infinity or NaN: the last one in the model's order."""
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return name
    return None
