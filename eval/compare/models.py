"""A comparison of models that are trained already: they are evaluated on the same test data, and measured."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

import zoo
from zoo.checkpoint import load_pretrained
from zoo.eval.bench.cost import MakeModel, verdict
from zoo.eval.compare import budget, results
from zoo.eval.compare.cells import FINISHED
from zoo.eval.compare.config import FOR_MODELS, TRAINER_FOR_MODELS, CompareConfig, Words
from zoo.eval.compare.plan import STATE_LENGTHS, data_facts, longest
from zoo.eval.compare.results import Row
from zoo.eval.evaluate import evaluate
from zoo.eval.history import History, history
from zoo.eval.measure import machine_info
from zoo.eval.suites import data_config
from zoo.kernels.errors import ConfigError
from zoo.model import Model
from zoo.train.config import train_config
from zoo.train.data import DataModule
from zoo.train.folder import RunFolder, different_keys
from zoo.train.objectives import make_objective
from zoo.train.run import pick_device

LOADING = frozenset({"eval_batch_size", "num_workers"})
"""Settings of data that decide no result, and those that decide the order of training alone:"""
ORDER = frozenset({"batch_size", "shuffle"})


class Evaluated(NamedTuple):
    """What came out."""

    told: dict[str, Any]
    """What comparison.json says."""
    rows: list[Row]
    """One per model."""
    makers: list[tuple[str, MakeModel]]
    """Label and maker of each model."""
    device: torch.device
    """On which they were evaluated."""


def evaluate_models(config: CompareConfig, words: Words, console: Console) -> Evaluated:
    """Evaluates the models on the test split of one dataset.

    Of what is known of their training, the rows have how it went, and not its scores: those may be of other examples.

    Raises:
        ConfigError: Nobody says on which data, or the models were trained on different ones; a GPU is asked for, and
            there is none.
        CheckpointError: There is no such model.
        DataError: Models of one seed were trained on different batches.
    """
    names = _labels(config.models or [])
    pasts = {label: history(name) for label, name in names.items()}
    name, settings, first = _data(config, pasts)
    records = {label: past.record for label, past in pasts.items() if past is not None}
    hashed = [(label, record.get("seed"), record) for label, record in records.items() if "batch_hash" in record]
    results.check_batches(hashed, lambda one, other: _why(records[one], records[other]))
    data = DataModule(data_config(name, settings, tuple(words.train)), seed=0)
    data.prepare_data()
    length = longest(data.source, "test")
    trainer = train_config([word for word in words.train if word.startswith("trainer.")]).trainer
    device = pick_device(trainer.accelerator)
    objective_name = config.objective or (first.objective if first else "causal")
    mask_rate = first.mask_rate if first and first.objective == objective_name else None
    objective = make_objective(objective_name, data.source.vocab_size, mask_rate=mask_rate)
    is_text = objective_name == "causal" and data.source.bytes_per_label("test") is not None
    metric = "bits_per_byte" if is_text else "acc"
    entries, rows = [], []
    for label, place in names.items():
        model = load_pretrained(place, device=device)
        row: Row = {"label": label, "arch": model.architecture, "chosen": True, "reason": ""}
        if label in records:
            row |= results.course(records[label]) | {"seed": records[label].get("seed"), "run": _run(place)}
        row["params"] = sum(p.numel() for p in model.parameters())
        try:
            scores = evaluate(model, data, objective=objective, batches=trainer.eval_batches)
            row |= {"status": FINISHED, **results.test_scores(scores, metric)}
            console.print(f"{label}: {metric} {scores.get(metric, float('nan')):.4f}", highlight=False, soft_wrap=True)
        except Exception as error:  # as in training, what ends one leaves the others
            row["status"], row["reason"] = verdict(error)
            line = f"{label}: {row['status'].replace('_', ' ')}: {row['reason']}"
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        entries.append(_describe(label, model, length))
        rows.append(row)
    counted = {key: getattr(config, key) for key in FOR_MODELS} | {"data": name, "objective": objective_name}
    counted["trainer"] = {key: getattr(trainer, key) for key in TRAINER_FOR_MODELS}
    told = {
        "settings": counted,
        "data": data_facts(data.source, length),
        "metric": {"name": metric, "higher_is_better": metric == "acc"},
        "architectures": entries,
        "seeds": [],
        "lrs": [],
        "machine": machine_info(device),
        "zoo_version": zoo.__version__,
    }
    makers: list[tuple[str, MakeModel]] = [
        (label, functools.partial(load_pretrained, place)) for label, place in names.items()
    ]
    return Evaluated(told, rows, makers, device)


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
        changes = different_keys(_task(first), _task(past))
        if changes:
            key, before, now = changes[0]
            raise ConfigError(
                f"{label} and {other} were trained on different data ({key}: {before} and {now}), so one test set does "
                f"not serve both: compare models of one task, or look at each with zoo eval"
            )
    return first.data, first.settings, first


def _task(past: History) -> dict[str, Any]:
    """What two models have in common whose test sets are the same."""
    return {"data": {"is": past.data, **_without(past.settings, LOADING | ORDER)}, "objective": past.objective}


def _why(one: dict[str, Any], other: dict[str, Any]) -> str:
    """What to do about models that were trained on different batches, and the setting that made them different."""
    changes = different_keys(_batches(one), _batches(other))
    told = "their records do not say why"
    if changes:
        key, before, now = changes[0]
        told = f"they were trained with {key} {before} and {now}"
    return f"{told}: compare models of the same training data, or look at each with zoo eval"


def _without(settings: dict[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in keys}


def _batches(record: dict[str, Any]) -> dict[str, Any]:
    """What decides the training batches, as far as a record tells."""
    config = record.get("config", {})
    data = _without(config.get("data", {}), LOADING)
    return {
        "data": data.pop("name", None),
        **{f"data.{key}": value for key, value in data.items()},
        "trainer.segment_length": config.get("trainer", {}).get("segment_length"),
        **record.get("data_facts", {}),
    }


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
