"""The command `zoo eval`: a model on one dataset, or on a suite of them; a table, and a file if asked for."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from zoo.command import ModelSettings, PolicySettings, load_model, parse_command, print_help
from zoo.eval import matrix
from zoo.eval.evaluate import CHUNK, evaluate
from zoo.eval.history import History, history
from zoo.eval.measure import machine_info
from zoo.eval.suites import SUITES, Entry, Outcome, data_config, run_entry
from zoo.kernels.errors import ConfigError, DataError, ZooError
from zoo.model import Model
from zoo.settings import setting
from zoo.train.data import DataModule
from zoo.train.objectives import OBJECTIVES, make_objective

OWNER = "zoo eval"


@dataclass(kw_only=True)
class EvalConfig(ModelSettings):
    """What to evaluate, and on what."""

    model: str = setting("", "folder of a model or of its run, a name that `zoo list --pretrained` shows, or a hub id")
    models: list[str] | None = setting(
        None, "or several, in one table of training length and test length: give data.test_lengths=[64,128,...]"
    )
    data: str | None = setting(None, "dataset; its settings after a dot, data.seq_len=64; null: that of its training")
    suite: str | None = setting(None, f"or a suite of tasks: {', '.join(SUITES)}")
    split: str = setting("test", "which examples", choices=("test", "validation"))
    objective: str | None = setting(None, "what its labels are; null: as in its training", choices=list(OBJECTIVES))
    batches: int | None = setting(None, "only the first so many batches; null: all", minimum=1)
    chunk: int = setting(CHUNK, "tokens that a causal model reads at once, its state carried on", minimum=1)
    out: str | None = setting(None, "file for the results, .json; with models= also .csv")

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.model) == bool(self.models):
            raise ConfigError("zoo eval takes one of the two: model=NAME, or models=[NAME,NAME] for a table by length")
        if self.models and self.suite is not None:
            raise ConfigError(f"models= are put to one dataset, and suite={self.suite} has several: give data=")
        if self.data is not None and self.suite is not None:
            raise ConfigError("zoo eval takes one of the two: data=NAME or suite=NAME")
        if self.suite is not None and self.suite not in SUITES:
            self.fail("suite", f"expected {' or '.join(SUITES)}")
        if self.out is not None and not Path(self.out).absolute().parent.is_dir():
            self.fail("out", "there is no such folder: make it first")
        if self.out is not None and self.out.endswith(".csv") and not self.models:
            self.fail("out", "a .csv is for models=, expected a file .json")


def main() -> None:
    """Prints the metrics of one model."""
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print_help(EvalConfig, "zoo eval model=runs/mamba-mqar data=mqar")
        print("\ndata.KEY=VALUE sets the dataset, as in `zoo train`; without data= it is the one of the training.")
        return
    data_words = [word for word in arguments if word.startswith("data.")]
    config, policies = parse_command(EvalConfig, [word for word in arguments if word not in data_words], OWNER)
    console = Console()
    if config.models:
        _compare_lengths(config, policies, data_words, console)
        return
    model, codec = load_model(config, policies)
    past = history(config.model)
    if config.suite is not None:
        if data_words:
            raise ConfigError(f"{data_words[0]} sets one dataset, and suite={config.suite} has several: give data=")
        outcomes = [run_entry(entry, model, past, codec, config.chunk) for entry in _shown(SUITES[config.suite])]
    else:
        outcomes = [_one(config, data_words, model, past)]
    left_out: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.reason:
            left_out.setdefault(outcome.reason, []).append(outcome.name)
        else:
            _print(console, outcome)
    for reason, names in left_out.items():
        console.print(f"not evaluated, {reason}: {', '.join(names)}", highlight=False)
    if config.out is not None:
        _write(Path(config.out), _as_json(config, outcomes))


def _compare_lengths(config: EvalConfig, policies: PolicySettings, words: list[str], console: Console) -> None:
    """Several models on one dataset, by length; one that cannot be evaluated is a row with its reason."""
    rows, outcomes = [], []
    for name in config.models or ():
        alone = dataclasses.replace(config, model=name, models=None, out=None)
        past = history(name)
        try:
            outcome = _one(alone, words, load_model(alone, policies)[0], past)
        except ZooError as error:
            outcome = Outcome(name, reason=str(error))
        outcomes.append(outcome)
        trained = past.settings.get("seq_len") if past else None
        rows.append(matrix.Row(name, trained, matrix.by_length(outcome.metrics), outcome.reason))
    if not any(row.accuracies for row in rows):
        raise DataError(next((row.reason for row in rows if row.reason), "these data have no lengths to compare"))
    console.print(matrix.table(rows))
    for row in rows:
        if row.reason:
            console.print(f"not evaluated, {row.reason}: {row.model}", highlight=False)
    if config.out is not None:
        _write(Path(config.out), matrix.as_csv(rows) if config.out.endswith(".csv") else _as_json(config, outcomes))


def _one(config: EvalConfig, words: list[str], model: Model, past: History | None) -> Outcome:
    """The model on one dataset."""
    name = config.data or (past.data if past else None)
    if name is None:
        raise ConfigError(f"model={config.model} does not tell what it was trained on: say data=NAME")
    known = past is not None and past.data == name
    module = DataModule(data_config(name, past.settings if past and known else {}, tuple(words)), seed=0)
    objective = config.objective or (past.objective if past and known else "causal")
    mask_rate = past.mask_rate if past and known else None
    metrics = evaluate(
        model,
        module,
        split=config.split,
        objective=make_objective(objective, module.source.vocab_size, mask_rate=mask_rate),
        chunk=config.chunk,
        batches=config.batches,
        progress=lambda batches: _tracked(batches, name),
    )
    if not metrics:
        raise DataError(f"data={name}: the {config.split} split has no labels")
    levels = {} if objective == "masked" else module.source.levels
    return Outcome(name, metrics, levels, note="" if known else "other data than in its training")


def _tracked(items: Iterable[Any], what: str) -> Iterable[Any]:
    console = Console(stderr=True)
    return track(items, what, console=console, transient=True, disable=not console.is_terminal)


def _shown(entries: list[Entry]) -> Iterable[Entry]:
    return _tracked(entries, "suite")


def _print(console: Console, outcome: Outcome) -> None:
    """A table of one dataset: all of it, then each slice that has several values."""
    note = f" ({outcome.note})" if outcome.note else ""
    console.print(f"[bold]{outcome.name}[/]{note}", highlight=False, soft_wrap=True)
    rows: dict[str, dict[str, float]] = {}
    for key, value in outcome.metrics.items():
        kind, _, suffix = key.partition("/")
        rows.setdefault(suffix, {})[kind] = value
    sizes = Counter(suffix.partition("=")[0] for suffix in rows)
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    table = Table("", *(Column(kind.replace("_", " "), justify="right") for kind in kinds))
    for suffix, row in rows.items():
        if not suffix or sizes[suffix.partition("=")[0]] > 1:
            table.add_row(suffix or "all", *(f"{row[kind]:.4f}" if kind in row else "" for kind in kinds))
    console.print(table)
    if outcome.levels:
        levels = ", ".join(f"{level} {value:.4g}" for level, value in outcome.levels.items())
        console.print(f"for comparison: {levels}", highlight=False)


def _as_json(config: EvalConfig, outcomes: list[Outcome]) -> str:
    told = {
        "model": config.models or config.model,
        "split": config.split,
        "results": [outcome.to_dict() for outcome in outcomes],
        "machine": machine_info(),
    }
    return json.dumps(told, indent=2) + "\n"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise DataError(f"out={path}: cannot be written ({error.strerror})") from error
