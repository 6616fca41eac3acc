"""What a comparison does, decided before anything runs: contestants and their sizes, learning rates, cells."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import zoo
from zoo.eval.compare import budget
from zoo.eval.compare.budget import Fit, Size
from zoo.eval.compare.cells import Cell
from zoo.eval.compare.config import CompareConfig, Words
from zoo.eval.measure import machine_info
from zoo.kernels.errors import ConfigError, DataError
from zoo.registry import architecture, list_models
from zoo.train.config import BASELINE, DEFAULT_DATA, TrainConfig, TrainerConfig, as_override, train_config
from zoo.train.data import SPLITS, DataModule, Source, create_source
from zoo.train.folder import different_keys
from zoo.train.run import decide, pick_device

LR_GRID = (0.5, 1.0, 2.0)
"""Times the learning rate that suits data and architecture."""
STOP_AT = 0.99
"""Validation accuracy at which a run ends: what is learnt need not be learnt on."""
STEPS, VALIDATIONS = 0.6, 20
"""Of the steps that the dataset recommends, as each architecture has several runs; and looks at validation in them."""
STATE_LENGTHS = (1_024, 65_536)
MAY_CHANGE = frozenset({"jobs", "threads", "bench", "lengths", "launcher", "solved_at", "name", "folder"})
"""Settings that change no result of training."""
_ONE_ERROR = 4


T = TypeVar("T")


@dataclass(frozen=True)
class Contestant:
    """An architecture in its final size."""

    label: str
    arch: str
    words: tuple[str, ...]
    settings: dict[str, Any]
    size: Size
    match: Fit | None
    lrs: list[float]
    notes: list[str]
    state_bytes: dict[int, int]


@dataclass(frozen=True)
class Plan:
    """All that is decided."""

    config: CompareConfig
    words: Words
    base: TrainConfig
    """The run of the first contestant, for what all have in common."""
    source: Source[Any]
    length: int
    """Tokens of the longest training example."""
    metric: str
    contestants: list[Contestant]

    @property
    def higher_is_better(self) -> bool:
        """Of the metric."""
        return self.metric == "acc"

    @property
    def cells(self) -> list[Cell]:
        """In the order of the table."""
        return [
            Cell(who.label, who.arch, lr, seed, who.words)
            for who in self.contestants
            for lr in who.lrs
            for seed in self.config.seeds
        ]

    @property
    def name(self) -> str:
        """Of the folder, unless it is given one."""
        debug = "-debug" if self.config.trainer == "debug" else ""
        return self.config.name or f"{self.source.name}-{self.config.match}{debug}"


def make_plan(config: CompareConfig, words: Words) -> Plan:
    """Decides everything; makes the dataset, so that not every run does.

    Raises:
        ConfigError: An architecture, dataset or setting is not known, an architecture cannot do the task, or the budget
            cannot be reached.
        DataError: The data are not there.
    """
    names = list_models() if config.arch is None else config.arch
    for name in (*names, *words.arch):
        architecture(name)
    for name in words.arch:
        if name not in (*names, BASELINE):
            raise ConfigError(f"arch.{name}.... sets an architecture that is not compared: add it to arch=[...]")
    common = [
        f"data={config.data or DEFAULT_DATA}",
        f"trainer={config.trainer}",
        f"objective={config.objective}",
        f"trainer.stop_at={STOP_AT}",
        *words.train,
    ]

    def words_of(name: str) -> list[str]:
        return [f"arch={name}", *common, *words.arch.get(name, [])]

    base = _named(names[0], lambda: train_config(words_of(names[0])))
    pick_device(base.trainer.accelerator)
    data = DataModule(base.data, seed=0)
    data.prepare_data()
    source = data.source
    length = longest(source, "train")
    common += _pace(base.trainer, source)

    def given(name: str) -> dict[str, Any]:
        """The settings that are not for the budget to choose."""
        said = {word.partition("=")[0].split(".")[1] for word in words.arch.get(name, [])}
        decided = decide(train_config(words_of(name)), source).model
        return {key: value for key, value in decided.items() if key in said | {"vocab_size", "causal"}}

    target = config.budget
    if config.match != "none" and target is None:
        baseline = _named(BASELINE, lambda: budget.measure(BASELINE, given(BASELINE), length))
        target = budget.quantity(baseline, config.match)

    def contestant(name: str) -> Contestant:
        fit = None if target is None else budget.fit(name, given(name), config.match, target, length)
        changes = {} if fit is None else fit.changes
        chosen = (*words_of(name), *(f"arch.{key}={as_override(value)}" for key, value in changes.items()))
        decided = decide(train_config(chosen), source)
        lrs = config.lrs or [_rounded(factor * (decided.optim.lr or 0.0)) for factor in LR_GRID]
        lengths = (length, *STATE_LENGTHS)
        return Contestant(
            label=name,
            arch=name,
            words=chosen,
            settings=decided.model,
            size=budget.measure(name, decided.model, length),
            match=fit,
            lrs=sorted(lrs),
            notes=_notes(changes, decided.model, lrs if config.lrs is None else []),
            state_bytes={n: budget.measure(name, decided.model, n).state_bytes for n in lengths},
        )

    contestants = [_named(name, functools.partial(contestant, name)) for name in names]
    is_text = config.objective == "causal" and source.bytes_per_label("validation") is not None
    return Plan(
        config=config,
        words=words,
        base=decide(train_config(words_of(names[0])), source),
        source=source,
        length=length,
        metric="bits_per_byte" if is_text else "acc",
        contestants=contestants,
    )


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as comparison.json has it."""
    config, lrs = plan.config, [who.lrs for who in plan.contestants]
    settings = dataclasses.asdict(config) | {"data": plan.source.name}
    settings["trainer"] = {"preset": config.trainer, **dataclasses.asdict(plan.base.trainer)}
    settings["optim"] = {k: v for k, v in dataclasses.asdict(plan.base.optim).items() if k != "lr"}
    return {
        "settings": settings,
        "data": data_facts(plan.source, plan.length, SPLITS),
        "metric": {"name": plan.metric, "higher_is_better": plan.higher_is_better},
        "architectures": [_describe(who, config.match) for who in plan.contestants],
        "seeds": config.seeds,
        "lrs": lrs[0] if all(one == lrs[0] for one in lrs) else [],
        "machine": machine_info(pick_device(plan.base.trainer.accelerator)),
        "zoo_version": zoo.__version__,
    }


def _pace(trainer: TrainerConfig, source: Source[Any]) -> list[str]:
    """How long and how often, where the settings leave it open."""
    steps = trainer.max_steps or round(STEPS * source.recipe.max_steps)
    val_every = trainer.val_every or math.ceil(steps / VALIDATIONS)
    return [f"trainer.max_steps={steps}", f"trainer.val_every={val_every}"]


def longest(source: Source[Any], split: str) -> int:
    """Tokens of the longest examples of a split."""
    return lengths_of(source, split)[-1]


def lengths_of(source: Source[Any], split: str) -> list[int]:
    """The lengths of a split's examples, in tokens, from the shortest on."""
    return sorted({table.features["inputs"].length for table in source.load(split)})


def data_facts(source: Source[Any], length: int, splits: Sequence[str] = ("test",)) -> dict[str, Any]:
    """What comparison.json says of the data; of lengths, those of the splits that are read."""
    return {
        "name": source.name,
        "settings": dataclasses.asdict(source.config),
        "levels": source.levels,
        "levels_by_length": _levels_by_length(source),
        "unit": source.unit,
        "facts": source.facts(),
        "length": length,
        "lengths": {split: lengths_of(source, split) for split in splits},
    }


def _levels_by_length(source: Source[Any]) -> dict[str, dict[str, float]]:
    """By length, where a task can be tested at any: what would show no skill if that were the only one."""
    if not hasattr(source.config, "test_lengths"):
        return {}
    return {
        str(length): create_source(dataclasses.replace(source.config, test_lengths=[length])).levels
        for length in source.slice_values.get("seq_len", [])
    }


def _describe(who: Contestant, by: str) -> dict[str, Any]:
    match: dict[str, Any] = {"by": by}
    if who.match is not None:
        match |= {"target": who.match.target, "reached": who.match.reached, "mismatch": who.match.mismatch}
    return {
        "label": who.label,
        "arch": who.arch,
        "settings": who.settings,
        "params": who.size.params,
        "params_of_embedding": who.size.embedding,
        "flops_per_token": who.size.flops_per_token,
        "state_bytes": {str(length): size for length, size in who.state_bytes.items()},
        "match": match,
        "lrs": who.lrs,
        "notes": who.notes,
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What decides results and is not the same in two comparison.json, in words; empty where nothing is."""
    changes = different_keys(_identity(old), _identity(new))
    told = ", ".join(f"{key}: {before} there, {now} now" for key, before, now in changes[:_ONE_ERROR])
    return told + (f" and {len(changes) - _ONE_ERROR} more" if len(changes) > _ONE_ERROR else "")


def _identity(told: dict[str, Any]) -> dict[str, Any]:
    settings = told.get("settings", {})
    data = told.get("data", {})
    return {
        **{key: value for key, value in settings.items() if key not in {*MAY_CHANGE, "data", "arch"}},
        "data": {"is": data.get("name"), **data.get("settings", {})},
        "arch": [entry["label"] for entry in told.get("architectures", [])],
        **{entry["label"]: {**entry["settings"], "lrs": entry["lrs"]} for entry in told.get("architectures", [])},
    }


def _named(name: str, decide_it: Callable[[], T]) -> T:
    """What the call returns; an error of settings says which architecture they are of."""
    try:
        return decide_it()
    except (ConfigError, DataError) as error:
        told = str(error)
        raise type(error)(told if name in told else f"{name}: {told}") from error


def _notes(changes: dict[str, Any], settings: dict[str, Any], lrs: Sequence[float]) -> list[str]:
    notes = [f"sized by {', '.join(f'{key}={value}' for key, value in changes.items())}"] if changes else []
    notes.append(f"{settings['n_layers']} layers")
    return notes + ([f"learning rates {', '.join(f'{lr:g}' for lr in lrs)}"] if lrs else [])


def _rounded(lr: float) -> float:
    """Two digits: a learning rate is part of names."""
    return float(f"{lr:.2g}")
