"""A comparison of models that are trained already: they are evaluated on the same test data, and measured."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from rich.console import Console

import zoo
from zoo.checkpoint import load_pretrained
from zoo.eval.bench.cost import MakeModel
from zoo.eval.compare import budget, results
from zoo.eval.compare.cells import FAILED, FINISHED
from zoo.eval.compare.config import CompareConfig, Words
from zoo.eval.compare.plan import STATE_LENGTHS, data_facts, longest
from zoo.eval.compare.results import Row
from zoo.eval.evaluate import evaluate
from zoo.eval.history import History, history
from zoo.eval.measure import machine_info
from zoo.eval.suites import data_config
from zoo.kernels.errors import ConfigError, ZooError
from zoo.model import Model
from zoo.train.data import DataModule
from zoo.train.folder import RunFolder, different_keys
from zoo.train.objectives import make_objective


def evaluate_models(
    config: CompareConfig, words: Words, console: Console
) -> tuple[dict[str, Any], list[Row], list[tuple[str, MakeModel]]]:
    """Evaluates the models on the test split of one dataset.

    Returns:
        What comparison.json says, a row per model, and label and maker of each.

    Raises:
        ConfigError: Nobody says on which data, or the models were trained on different ones.
        CheckpointError: There is no such model.
        DataError: Models of one seed were trained on different batches.
    """
    names = _labels(config.models or [])
    pasts = {label: history(name) for label, name in names.items()}
    name, settings, first = _data(config, pasts)
    data = DataModule(data_config(name, settings, tuple(words.train)), seed=0)
    data.prepare_data()
    length = longest(data.source, "test")
    objective_name = first.objective if first else config.objective
    mask_rate = first.mask_rate if first else None
    objective = make_objective(objective_name, data.source.vocab_size, mask_rate=mask_rate)
    is_text = objective_name == "causal" and data.source.bytes_per_label("test") is not None
    metric = "bits_per_byte" if is_text else "acc"
    known = [(label, past.record) for label, past in pasts.items() if past is not None]
    results.check_batches((label, record.get("seed"), record) for label, record in known if "batch_hash" in record)
    entries, rows = [], []
    for label, place in names.items():
        model, past = load_pretrained(place), pasts[label]
        row: Row = {"label": label, "arch": model.architecture, "chosen": True, "reason": ""}
        if past is not None:
            row |= results.figures(past.record, metric) | {"seed": past.record.get("seed"), "run": _run(place)}
        row["params"] = sum(p.numel() for p in model.parameters())
        try:
            scores = evaluate(model, data, objective=objective)
            row |= {f"test_{key}": value for key, value in scores.items() if key.partition("/")[0] == metric}
            row["status"] = FINISHED
            console.print(f"{label}: {metric} {scores.get(metric, float('nan')):.4f}", highlight=False, soft_wrap=True)
        except ZooError as error:
            row |= {"status": FAILED, "reason": str(error)}
        entries.append(_describe(label, model, length))
        rows.append(row)
    told = {
        "settings": dataclasses.asdict(config) | {"data": name, "objective": objective_name},
        "data": data_facts(data.source, length),
        "metric": {"name": metric, "higher_is_better": metric == "acc"},
        "architectures": entries,
        "seeds": [],
        "lrs": [],
        "machine": machine_info(),
        "zoo_version": zoo.__version__,
    }
    return told, rows, [(label, functools.partial(load_pretrained, place)) for label, place in names.items()]


def _labels(models: list[str]) -> dict[str, str]:
    """A short name of each model, or its whole name where short ones are alike."""

    def short(name: str) -> str:
        path = Path(name)
        return (path.resolve().parent.name if path.name == "model" else path.name) if path.exists() else name

    labels = [short(name) for name in models]
    return {label if labels.count(label) == 1 else name: name for label, name in zip(labels, models, strict=True)}


def _run(place: str) -> str | None:
    """The folder of the run that a model came from, if it lies there."""
    folder = Path(place).resolve()
    return next((str(path) for path in (folder, folder.parent) if RunFolder(path).metrics.exists()), None)


def _data(config: CompareConfig, pasts: dict[str, History | None]) -> tuple[str, dict[str, Any], History | None]:
    """Name and settings of the data, and a model that was trained on them."""
    known = {label: past for label, past in pasts.items() if past is not None and config.data in (None, past.data)}
    if not known:
        if config.data is None:
            raise ConfigError("none of the models tells what it was trained on: say data=NAME")
        return config.data, {}, None
    (label, first), *others = known.items()
    for other, past in others:
        old = {"data": {"is": first.data, **first.settings}, "objective": first.objective}
        new = {"data": {"is": past.data, **past.settings}, "objective": past.objective}
        changes = different_keys(old, new)
        if changes:
            key, before, now = changes[0]
            raise ConfigError(
                f"{label} and {other} were trained on different data ({key}: {before} and {now}), so one test set does "
                f"not serve both: compare models of one task, or look at each with zoo eval"
            )
    return first.data, first.settings, first


def _describe(label: str, model: Model, length: int) -> dict[str, Any]:
    settings = dataclasses.asdict(model.config)
    sizes = {n: budget.measure(model.architecture, settings, n) for n in (length, *STATE_LENGTHS)}
    size = sizes[length]
    return {
        "label": label,
        "arch": model.architecture,
        "settings": settings,
        "params": size.params,
        "params_of_embedding": size.embedding,
        "flops_per_token": size.flops_per_token,
        "state_bytes": {str(n): one.state_bytes for n, one in sizes.items()},
        "match": {"by": "none"},
        "lrs": [],
        "notes": [f"{model.config.n_layers} layers"],
    }
