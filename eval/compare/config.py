"""The words on the command line of `zoo compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zoo.eval.compare.budget import UNITS
from zoo.kernels.errors import ConfigError, did_you_mean
from zoo.settings import Settings, parse_overrides, setting
from zoo.train.config import BASELINE, DEFAULT_DATA, TRAINERS
from zoo.train.objectives import OBJECTIVES

OWNER = "zoo compare"
TRAIN_GROUPS = ("data", "trainer", "optim")
FOR_MODELS = ("models", "data", "objective", "solved_at", "bench", "lengths", "name", "folder")
"""Settings that decide something beside `models`, as those of the dataset do, and of the trainer:"""
TRAINER_FOR_MODELS = ("accelerator", "eval_batches")


@dataclass(kw_only=True)
class CompareConfig(Settings):
    """What is compared, on what, and how."""

    arch: list[str] | None = setting(None, "architectures, as in mamba,transformer; null: all that are registered")
    models: list[str] | None = setting(None, "or trained models: runs, names of `zoo list --pretrained`, hub ids")
    data: str | None = setting(None, f"dataset; null: {DEFAULT_DATA}, or what the models were trained on")
    trainer: str = setting("auto", "preset of the trainer: " + ", ".join(TRAINERS))
    objective: str | None = setting(
        None, f"what is learnt: {', '.join(OBJECTIVES)}; null: causal, or what the models learnt",
        choices=list(OBJECTIVES),
    )  # fmt: skip
    seeds: Any = setting(2, "how many seeds, or which: seeds=3 or seeds=[0,1,2]")
    lrs: list[float] | None = setting(
        None, "learning rates, for all; null: half, one and two times what suits data and architecture"
    )
    match: str = setting(
        "params", "what is the same for all: params, flops (per token, forward), state (bytes) or none",
        choices=(*UNITS, "none"),
    )  # fmt: skip
    budget: float | None = setting(None, f"how much of it; null: what {BASELINE} has with its settings", above=0)
    solved_at: float = setting(0.9, "test accuracy from which on a seed has solved the task", above=0, maximum=1)
    bench: bool = setting(True, "measure speed and memory too")
    lengths: list[int] | None = setting(None, "tokens of a sequence in that; null: the task's, and three longer ones")
    jobs: int | None = setting(None, "runs at a time; null: one per GPU, or per CPU core over threads", minimum=1)
    threads: int | None = setting(None, "CPU threads of a run; null: one, or what is there for each GPU", minimum=1)
    launcher: str | None = setting(
        None, "train by Hydra's launcher of that name, as in submitit_slurm; its settings: launcher.partition=gpu"
    )
    name: str | None = setting(None, "name of the results' folder; null: made from data and match")
    folder: str = setting("comparisons", "folder of the comparisons")

    def __post_init__(self) -> None:
        super().__post_init__()
        seeds = list(range(self.seeds)) if type(self.seeds) is int else self.seeds
        if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
            self.fail("seeds", "expected how many, or which: seeds=3 or seeds=[0,1,2]")
        self.seeds = seeds
        for key in ("arch", "models", "seeds", "lrs"):
            values = getattr(self, key)
            if values is not None and (not values or len({*values}) < len(values)):
                self.fail(key, "expected at least one, and none twice")
        for lr in self.lrs or []:
            if not 0 < lr < float("inf"):
                self.fail("lrs", "expected numbers above 0")
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            self.fail("lengths", "expected at least one length, all of at least 1")
        if self.trainer not in TRAINERS:
            self.fail("trainer", did_you_mean(self.trainer, TRAINERS))
        if self.models is not None and self.arch is not None:
            raise ConfigError(
                f"{OWNER} takes one of the two: arch=... to train, models=... to evaluate what is trained"
            )
        if self.models is None and self.objective is None:
            self.objective = "causal"
        if self.match == "none" and self.budget is not None:
            self.fail("budget", "expected match=params, flops or state beside it")


@dataclass(frozen=True)
class Words:
    """The words of the command line that are not settings of the comparison itself."""

    train: list[str]
    """Of data, trainer and optimiser."""
    arch: dict[str, list[str]]
    """Of single architectures, as `zoo.train` has them."""
    launcher: list[str]


def read_words(arguments: Sequence[str]) -> tuple[CompareConfig, Words]:
    """The settings on a command line.

    Raises:
        ConfigError: A word is not `key=value`, or not known, or it would decide nothing.
    """
    own: list[str] = []
    words = Words([], {}, [])
    for word in arguments:
        group, dot, rest = word.partition("=")[0].partition(".")
        if not dot or "=" not in word:
            own.append(word)
        elif group == "arch":
            label, _, key = rest.partition(".")
            if not key:
                raise ConfigError(f"{word!r}: whose setting? Write arch.NAME.{word.partition('.')[2]}")
            words.arch.setdefault(label, []).append(f"arch.{word.removeprefix(f'arch.{label}.')}")
        elif group == "launcher":
            words.launcher.append(f"hydra.{word}")
        elif group in TRAIN_GROUPS:
            if word.startswith("optim.lr="):
                raise ConfigError(f"{word!r}: learning rates are compared, so give them as lrs=[...]")
            words.train.append(word)
        else:
            raise ConfigError(f"{word!r}: {did_you_mean(group, ('arch', 'launcher', *TRAIN_GROUPS))}")
    config = parse_overrides(CompareConfig, own, OWNER)
    if config.models is not None:
        _check_for_models(arguments)
    return config, words


def _check_for_models(arguments: Sequence[str]) -> None:
    known = (*FOR_MODELS, *(f"trainer.{key}" for key in TRAINER_FOR_MODELS))
    for word in arguments:
        key = word.partition("=")[0]
        if key not in known and not key.startswith("data."):
            raise ConfigError(
                f"{word!r} decides nothing beside models=..., which are trained already: leave it out; what counts "
                f"there is {', '.join(known[1:])} and data.KEY"
            )
