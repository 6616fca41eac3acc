"""The families, and how one is recognised: by config.json, or by the names of tensors where there is none."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from zoo.config import ModelConfig
from zoo.kernels.errors import CheckpointError, ConfigError, did_you_mean
from zoo.pretrained import bigbird, llama, longformer, mamba, mamba2, rwkv4, rwkv7
from zoo.pretrained.family import Family

FAMILIES = (
    llama.FAMILY,
    mamba.FAMILY,
    mamba.ORIGINAL,
    mamba2.FAMILY,
    mamba2.ORIGINAL,
    rwkv4.FAMILY,
    rwkv4.PTH,
    rwkv7.PTH,
    longformer.FAMILY,
    bigbird.FAMILY,
)

STRANGERS = {
    "RWKV-5": (r"blocks\.0\.att\.time_mix_k", r"blocks\.0\.att\.ln_x\.weight"),
    "RWKV-6": (r"blocks\.0\.att\.time_maa_x",),
}
"""Marks, as families have them, of files that are likely to be tried and that the zoo does not load."""


def by_settings(settings: dict[str, Any], where: str) -> Family:
    """The family that a config.json belongs to.

    Raises:
        CheckpointError: None that the zoo knows, or weights in a quantised form.
    """
    if settings.get("quantization_config"):
        raise CheckpointError(f"{where} has a quantization_config: the zoo loads unquantised weights only")
    if "ssm_cfg" in settings and "model_type" not in settings:
        cfg = settings["ssm_cfg"]
        layer = cfg.get("layer", "Mamba1") if isinstance(cfg, dict) else None
        originals = {"Mamba1": mamba.ORIGINAL, "Mamba2": mamba2.ORIGINAL}
        if layer not in originals:
            raise CheckpointError(f"{where} has ssm_cfg={cfg!r}: expected a layer Mamba1 or Mamba2")
        return originals[layer]
    known = {kind: family for family in FAMILIES for kind in family.model_types}
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        raise CheckpointError(f"{where} has model_type {kind!r}: {did_you_mean(str(kind), known)}")
    return known[kind]


def by_names(names: Collection[str], where: str) -> Family:
    """The family that a file without settings belongs to.

    Raises:
        CheckpointError: None that the zoo knows.
    """

    def fits(marks: Collection[str]) -> bool:
        return all(any(re.fullmatch(mark, name) for name in names) for mark in marks)

    for stranger, marks in STRANGERS.items():
        if fits(marks):
            raise CheckpointError(f"{where} is {stranger} by the names of its tensors: the zoo loads RWKV-4 and RWKV-7")
    for family in FAMILIES:
        if family.marks and fits(family.marks):
            return family
    known = ", ".join(family.name for family in FAMILIES if family.marks)
    raise CheckpointError(
        f"{where} comes without a config.json, and by the names of its tensors it is none of {known}: put a "
        f"config.json beside it"
    )


def for_saving(architecture: str, config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The family in which a model of ours can be written, and its settings there.

    Raises:
        ConfigError: There is none, or it has no word for a setting.
    """
    families = [family for family in FAMILIES if family.architecture == architecture and family.write is not None]
    if not families:
        raise ConfigError(f'transformers has no {architecture} like ours: save with format="zoo"')
    reasons = []
    for family in families:
        assert family.write is not None
        try:
            return family, family.write(config)
        except ConfigError as error:
            reasons.append(error)
    raise reasons[0]
