"""What a run is: its settings, and the Hydra structured configs made from the registries' own dataclasses."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from hydra import compose, initialize
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from zoo.checkpoint import model_settings
from zoo.config import ModelConfig
from zoo.kernels.errors import ConfigError
from zoo.registry import architecture, list_models
from zoo.settings import Settings, field_types, setting
from zoo.train.data import DataConfig, get_data, list_data
from zoo.train.objectives import MASK_RATE, OBJECTIVES
from zoo.train.optim import OptimConfig

S = TypeVar("S", bound=Settings)
CONFIG_NAME = "train"
DEFAULT_ARCH, DEFAULT_DATA = "mamba", "mqar"
BASELINE = "transformer"
PRECISIONS = ("fp32", "bf16-mixed", "fp16-mixed")


@dataclass(kw_only=True)
class TrainerConfig(Settings):
    """How long and on what to train."""

    accelerator: str = setting("auto", "auto: a GPU if there is one, else the CPU", choices=("auto", "cpu", "gpu"))
    precision: str = setting("fp32", "number format; mixed ones keep the weights in fp32", choices=PRECISIONS)
    max_steps: int | None = setting(None, "optimiser steps; null: what the dataset recommends", minimum=1)
    max_minutes: float | None = setting(None, "stop after this many minutes of run time; null: never", above=0)
    stop_at: float | None = setting(None, "stop at this validation accuracy; null: never", above=0, maximum=1)
    segment_length: int | None = setting(
        None,
        "read text in order, so many tokens of it per step, and carry the model's state along (truncated "
        "back-propagation through time); null: each window stands for itself",
        minimum=1,
    )
    accumulate: int = setting(1, "batches per optimiser step", minimum=1)
    val_every: int | None = setting(
        None, "steps between validations, each with a checkpoint; null: ten in all", minimum=1
    )
    eval_batches: int | None = setting(None, "batches of each validation and test; null: all", minimum=1)
    log_every: int = setting(10, "steps between rows of training metrics", minimum=1)
    keep_checkpoints: int = setting(2, "newest checkpoints to keep beside the best", minimum=1)
    compile: bool = setting(False, "torch.compile the model")


TRAINERS = {
    "auto": (TrainerConfig(), "a GPU if there is one, else the CPU"),
    "cpu": (TrainerConfig(accelerator="cpu"), "the CPU"),
    "gpu": (TrainerConfig(accelerator="gpu", precision="bf16-mixed"), "a GPU, in bf16-mixed; an error without one"),
    "debug": (
        TrainerConfig(max_steps=4, val_every=2, eval_batches=1, log_every=1),
        "four steps and tiny validations: every part runs, in seconds",
    ),
}
OPTIMISERS = {"adamw": (OptimConfig(), "AdamW with warm-up and a schedule")}


@dataclass(kw_only=True)
class RunConfig(Settings):
    """What a run learns, from which seed, and where it goes."""

    objective: str = setting(
        "causal",
        "causal: each label from what stands before it; masked: hidden tokens from both sides; classify: one label per "
        "document from the mean over it; arch.causal follows where it is left out",
        choices=list(OBJECTIVES),
    )
    mask_rate: float | None = setting(
        None, f"share of the tokens that objective=masked hides; null: {MASK_RATE}", above=0, maximum=1
    )
    seed: int = setting(0, "seed of the weights, of dropout and of the order of the data", minimum=0, maximum=2**63 - 1)
    name: str | None = setting(None, "name of the run's folder; null: made from the settings")
    runs_dir: str = setting("runs", "folder of the runs")
    init: str | None = setting(
        None, "start from the weights of this model (a run, a folder, a hub id); arch and its settings are the model's"
    )
    resume: bool = setting(
        False,
        "go on with the newest run of this name, if any; its settings must be these",
    )


@dataclass(kw_only=True)
class TrainConfig(RunConfig):
    """Everything that decides a run; `train_config` makes one from words as on the command line."""

    arch: str = DEFAULT_ARCH
    model: dict[str, Any] = field(default_factory=dict)
    """Settings of the architecture; `vocab_size` and `causal` are left out where data and objective decide them."""
    data: DataConfig
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def to_dict(self, data_name: str) -> dict[str, Any]:
        """The settings as a tree of plain values, laid out as on the command line."""
        return {
            "arch": {"name": self.arch, **self.model},
            "data": {"name": data_name, **dataclasses.asdict(self.data)},
            "trainer": dataclasses.asdict(self.trainer),
            "optim": dataclasses.asdict(self.optim),
            "objective": self.objective,
            "mask_rate": self.mask_rate,
            "seed": self.seed,
            "name": self.name,
            "runs_dir": self.runs_dir,
            "init": self.init,
            "resume": self.resume,
        }


@dataclass(kw_only=True)
class _Root(RunConfig):
    """The command line's tree: groups, then the top level, then what Hydra itself must not do."""

    defaults: list[Any] = field(
        default_factory=lambda: [
            {"arch": DEFAULT_ARCH},
            {"data": DEFAULT_DATA},
            {"trainer": "auto"},
            {"optim": "adamw"},
            {"override hydra/job_logging": "none"},
            {"override hydra/hydra_logging": "none"},
            "_self_",
        ]
    )
    arch: Any = MISSING
    data: Any = MISSING
    trainer: TrainerConfig = MISSING
    optim: OptimConfig = MISSING
    # A run keeps its own folder: Hydra neither makes one nor copies configs and logs. Of a sweep it writes one file,
    # runs_dir/multirun.yaml, with the words of its command line.
    hydra: Any = field(
        default_factory=lambda: {
            "output_subdir": None,
            "run": {"dir": "."},
            "sweep": {"dir": "${runs_dir}", "subdir": "."},
        }
    )


def register_configs() -> None:
    """Puts every registered architecture and dataset, the presets and the root into Hydra's store."""
    store = ConfigStore.instance()
    settings: Any  # mypy asks the instances for the hash that the class has
    for name in list_models():
        settings = architecture(name).config
        store.store(group="arch", name=name, node=_named(name, settings))
    for name in list_data():
        settings = get_data(name).config
        store.store(group="data", name=name, node=_named(name, settings))
    for name, (trainer, _) in TRAINERS.items():
        store.store(group="trainer", name=name, node=trainer)
    for name, (optimiser, _) in OPTIMISERS.items():
        store.store(group="optim", name=name, node=optimiser)
    store.store(name=CONFIG_NAME, node=_Root)


def train_config(overrides: Sequence[str] = ()) -> TrainConfig:
    """The settings of a run from words as on the command line: `train_config(["arch=mamba", "seed=1"])`.

    Raises:
        ConfigError: An unknown name or key, or a bad value.
    """
    from zoo.train.cli import translate  # which knows these configs

    register_configs()
    try:
        with initialize(version_base="1.3", config_path=None):
            return from_hydra(compose(config_name=CONFIG_NAME, overrides=with_init(overrides)))
    except Exception as error:
        raise translate(error) or error from None


def with_init(words: Sequence[str]) -> list[str]:
    """The words of a command line; where they name a model to start from, its architecture and settings before them.

    Raises:
        ConfigError: `arch` is another architecture than the model's, or there are several models.
        CheckpointError: There is no such model.
    """
    inits = [word.removeprefix("init=") for word in words if word.startswith("init=")]
    if not inits or inits[-1] in ("", "null"):
        return list(words)
    if "," in inits[-1]:
        raise ConfigError(f"init={inits[-1]}: expected one model; give each its own command")
    name, settings = model_settings(inits[-1].strip("'\""))
    for word in words:
        if word.startswith("arch=") and word != f"arch={name}":
            raise ConfigError(f"{word} does not fit init={inits[-1]}, which is a {name}: leave arch out")
    kept = {f.name: f for f in dataclasses.fields(architecture(name).config)}
    changed = {key: value for key, value in settings.items() if value != _default(kept[key])}
    return [f"arch={name}", *(f"arch.{key}={as_override(value)}" for key, value in changed.items()), *words]


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def as_override(value: Any) -> str:
    """A plain value in Hydra's grammar, as `key=value` words have it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{as_override(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(as_override, value)) + "]"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def from_hydra(config: DictConfig) -> TrainConfig:
    """Checks a composed tree and gives it its types.

    Raises:
        ConfigError: A value is out of its range; the message names the full key.
    """
    tree = cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True, throw_on_missing=False))
    for name in ("arch", "data", "trainer", "optim"):
        if not isinstance(tree.get(name), dict):
            raise ConfigError(f"~{name} takes away what every run needs: leave it out")
    groups = {name: dict(tree.pop(name)) for name in ("arch", "data", "trainer", "optim")}
    arch, data = groups["arch"].pop("name"), groups["data"].pop("name")
    run = _build("", RunConfig, tree)
    model = {key: value for key, value in groups["arch"].items() if value != MISSING}
    # The data decide the vocabulary later; any size will do to check the other settings now.
    decided = {"vocab_size": 1, "causal": OBJECTIVES[run.objective].causal}
    checked = _build("arch", architecture(arch).config, decided | model)
    model = {key: value for key, value in dataclasses.asdict(checked).items() if key in model}
    return TrainConfig(
        arch=arch,
        model=model,
        data=_build("data", get_data(data).config, groups["data"]),
        trainer=_build("trainer", TrainerConfig, groups["trainer"]),
        optim=_build("optim", OptimConfig, groups["optim"]),
        **dataclasses.asdict(run),
    )


def _build(group: str, settings: type[S], values: dict[str, Any]) -> S:
    """An instance of `settings`; an error message that begins with a field's name gets the group in front."""
    try:
        return settings.from_dict(values, group or "a run")
    except ConfigError as error:
        starts_with_field = group and str(error).partition("=")[0] in values
        raise ConfigError(f"{group}.{error}" if starts_with_field else str(error)) from error


@functools.cache
def _named(name: str, settings: type[Any]) -> type[Any]:
    """The settings class with one more field, the name that it was chosen by, and mappings that take new keys.

    An architecture's `causal` has no value here unless it is given one, so that the objective can decide.
    """
    fields: list[tuple[str, Any, Any]] = [("name", str, field(default=name))]
    if issubclass(settings, ModelConfig):
        fields.append(("causal", bool, field(default=MISSING)))
    for mapping in dataclasses.fields(settings):
        if typing.get_origin(field_types(settings)[mapping.name]) is dict:
            assert mapping.default_factory is not dataclasses.MISSING
            default = mapping.default_factory()
            open_mapping = functools.partial(DictConfig, default, flags={"struct": False})
            fields.append((mapping.name, Any, field(default_factory=open_mapping)))
    return dataclasses.make_dataclass(settings.__name__, fields, bases=(settings,), kw_only=True)
