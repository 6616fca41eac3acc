"""The page that `python -m zoo.train --help` shows."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence

from zoo.config import ModelConfig
from zoo.registry import architecture, first_line, list_models
from zoo.settings import Settings, describe_settings
from zoo.train.config import DEFAULT_ARCH, DEFAULT_DATA, OPTIMISERS, TRAINERS, RunConfig, TrainerConfig
from zoo.train.data import get_data, list_data
from zoo.train.optim import OptimConfig

_WIDTH = 118
_INDENT = 30

_EXAMPLES = """\
Trains an architecture of the zoo on a dataset, tests it, and keeps everything in one folder under runs/.

usage: python -m zoo.train [group=option ...] [key=value ...]

examples:
  python -m zoo.train arch=mamba                                  all defaults: MQAR, a minute or two on two CPU cores
  python -m zoo.train arch=transformer data=pystdlib              bytes of Python's standard library
  python -m zoo.train data=text data.path=books/                  your own text
  python -m zoo.train arch=mamba arch.d_state=32 trainer.max_steps=500 optim.lr=1e-3 seed=1
  python -m zoo.train data=listops objective=classify             one label per document, read from both sides
  python -m zoo.train arch=mamba resume=true                      go on with a run that was killed
  python -m zoo.train trainer=debug                               does everything run? a few seconds
  python -m zoo.train -m arch=mamba,transformer seed=0,1,2        a sweep: six runs, one after the other
  python -m zoo.train -m seed=0,1,2 hydra/launcher=submitit_slurm the same on SLURM (needs hydra-submitit-launcher)
  python -m zoo.train arch=mamba --cfg job                        show the settings, run nothing
  tensorboard --logdir runs                                       watch"""


def help_text(arguments: Sequence[str] = ()) -> str:
    """Examples, then every group and setting; those of one architecture and one dataset, chosen as in a run."""
    # Of a sweep, the first.
    chosen = {key: value.partition(",")[0] for key, value in (word.split("=", 1) for word in arguments if "=" in word)}
    arch, data = chosen.get("arch", DEFAULT_ARCH), chosen.get("data", DEFAULT_DATA)
    shared = {field.name for field in dataclasses.fields(ModelConfig)}
    sections = [
        _EXAMPLES,
        "groups (group=option; the first is the default):\n"
        + _rows(
            [
                *_options("arch", DEFAULT_ARCH, {name: architecture(name).summary for name in list_models()}),
                *_options("data", DEFAULT_DATA, {name: first_line(get_data(name).source) for name in list_data()}),
                *_options("trainer", "auto", {name: text for name, (_, text) in TRAINERS.items()}),
                *_options("optim", "adamw", {name: text for name, (_, text) in OPTIMISERS.items()}),
            ]
        ),
        "settings of the run (key=value):\n" + _rows(_settings("", RunConfig)),
        "settings of every architecture:\n" + _rows(_settings("arch.", ModelConfig)),
        f"settings of arch={arch} (another: arch=... --help):\n"
        + _rows([row for row in _settings("arch.", architecture(arch).config) if row[0][5:] not in shared]),
        f"settings of data={data} (null: its own choice; another: data=... --help):\n"
        + _rows(_settings("data.", get_data(data).config)),
        "settings of the trainer:\n" + _rows(_settings("trainer.", TrainerConfig)),
        "settings of the optimiser:\n" + _rows(_settings("optim.", OptimConfig)),
        "ZOO_DEBUG=1 shows tracebacks. Hydra's own options: --hydra-help.",
    ]
    return "\n\n".join(sections)


def _options(group: str, default: str, options: dict[str, str]) -> list[tuple[str, str, str]]:
    ordered = sorted(options, key=lambda name: (name != default, name))
    return [(f"{group}={name}", "", options[name]) for name in ordered]


def _settings(prefix: str, settings: type[Settings]) -> list[tuple[str, str, str]]:
    words = {"True": "true", "False": "false"}  # as on the command line
    return [(prefix + name, words.get(default, default), text) for name, default, text in describe_settings(settings)]


def _rows(rows: Sequence[tuple[str, str, str]]) -> str:
    lines = []
    for name, default, text in rows:
        whole = text + (f" [{default}]" if default else "")
        wrapped = textwrap.wrap(whole, _WIDTH - _INDENT) or [""]
        lines.append(f"  {name:<{_INDENT - 3}} {wrapped[0]}")
        lines += [" " * _INDENT + line for line in wrapped[1:]]
    return "\n".join(lines)
