"""What a run came to: summary.json, and the table at the end."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from zoo import kernels
from zoo.train.callbacks import Books
from zoo.train.checkpoint import Checkpoints
from zoo.train.config import BASELINE, DEFAULT_ARCH, TrainConfig
from zoo.train.data import DataModule
from zoo.train.environment import describe_device, git_commit, versions
from zoo.train.folder import RunFolder
from zoo.train.module import SequenceModule


def summarise(
    config: TrainConfig,
    folder: RunFolder,
    module: SequenceModule,
    data: DataModule,
    books: Books,
    checkpoints: Checkpoints,
    *,
    step: int,
    status: str,
    command: str | None,
    error: str | None = None,
) -> dict[str, Any]:
    """Everything worth knowing of a run.

    Args:
        config: Its settings, every default decided.
        folder: Where it is.
        module: What was trained.
        data: On what.
        books: At what cost.
        checkpoints: Which step was best.
        step: Optimiser steps taken.
        status: "finished", "interrupted" or "failed".
        command: The command line, if there was one.
        error: Why it failed.

    Returns:
        A tree of plain values. `metrics` has "train" of the last step, "val" and "test"; in a finished run these two
        are of the weights with the lowest validation loss, taken at `best_step`, which `model/` holds too.
    """
    results, meter = module.results, books.meter
    finished = status == "finished"
    return {
        "arch": config.arch,
        "data": data.source.name,
        "objective": config.objective,
        "segment_length": config.trainer.segment_length,
        "seed": config.seed,
        "status": status,
        "error": error,
        "params": sum(p.numel() for p in module.model.parameters()),
        "steps": step,
        "best_step": checkpoints.best_step if checkpoints.best_step >= 0 else None,
        "tokens": books.tokens,
        "wall_seconds": books.wall_seconds,
        "train_seconds": meter.seconds,
        "tokens_per_second": meter.tokens_per_second,
        "peak_memory_bytes": meter.peak_bytes or None,
        "device": describe_device(meter.device),
        "dtype": config.trainer.precision,
        "backends": kernels.used(),
        "final_loss": results.get("train", {}).get("loss"),
        "metrics": {
            "train": results.get("train", {}),
            "val": checkpoints.best if finished else results.get("val", {}),
            "test": results.get("test", {}) if finished else {},
        },
        # Those of the data's own labels, which masked tokens are not.
        "levels": {} if config.objective == "masked" else data.source.levels,
        "batch_hash": books.batch_hash,
        "batch_hash_after": books.prefix_hashes,
        "data_facts": data.source.facts(),
        "text": data.source.unit is not None,
        "versions": versions(),
        "git_commit": git_commit(),
        "command": command,
        "folder": str(folder.path),
        "config": config.to_dict(data.source.name),
    }


# fmt: off
_PRINTED = {
    "arch", "data", "objective", "seed", "status", "best_step", "steps", "params", "tokens_per_second",
    "peak_memory_bytes", "wall_seconds", "device", "dtype", "backends", "folder", "text", "levels", "metrics",
}
# fmt: on


def is_finished(summary: dict[str, Any] | None) -> bool:
    """Whether a summary read from a file is that of a finished run, with all that `print_table` shows."""
    if summary is None or summary.get("status") != "finished" or _PRINTED - summary.keys():
        return False
    return isinstance(summary["metrics"], dict) and {"val", "test"} <= summary["metrics"].keys()


def print_table(console: Console, summary: dict[str, Any]) -> None:
    """The end of a run on one screen: what came out, what it cost, where it is, what to do next."""
    metrics = summary["metrics"]
    how = "" if summary["objective"] == "causal" else f", {summary['objective']}"
    if summary.get("segment_length") is not None:
        how = f", segments of {summary['segment_length']:,}"
    title = f"{summary['arch']} on {summary['data']}{how}, seed {summary['seed']}: {summary['status']}"
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for split, name in (("test", "test"), ("val", "validation")):
        scores = metrics[split]
        if "bits_per_byte" in scores:
            table.add_row(f"{name} bits per byte", f"{scores['bits_per_byte']:.4f}")
        if "acc" in scores:
            levels = ", ".join(f"{level} {value:.4f}" for level, value in summary["levels"].items())
            table.add_row(f"{name} accuracy", f"{scores['acc']:.4f}" + (f"   ({levels})" if levels else ""))
        by_slice = {key: value for key, value in scores.items() if key.startswith("acc/") and "," not in key}
        # One value per slice says nothing that the line above did not.
        if split == "test" and len(by_slice) > len({key.partition("=")[0] for key in by_slice}):
            table.add_row("", "  ".join(f"{key.removeprefix('acc/')}: {value:.3f}" for key, value in by_slice.items()))
    early = summary["best_step"] not in (None, summary["steps"])
    table.add_row("steps", f"{summary['steps']:,}" + (f", best at {summary['best_step']:,}" if early else ""))
    table.add_row("parameters", f"{summary['params']:,}")
    if summary["tokens_per_second"]:
        table.add_row("training speed", f"{summary['tokens_per_second']:,.0f} tokens/s")
    if summary["peak_memory_bytes"]:
        what = "allocated" if summary["device"].startswith("cuda") else "whole process"
        table.add_row("peak memory", f"{summary['peak_memory_bytes'] / 2**20:,.0f} MiB ({what})")
    table.add_row("time", f"{summary['wall_seconds']:,.0f} s")
    table.add_row("device", f"{summary['device']}, {summary['dtype']}")
    backends = ", ".join(f"{operator}: {backend}" for operator, backend in summary["backends"].items())
    table.add_row("kernels", backends or "torch's own")
    console.print(table, highlight=False)
    # Below the table and on one line each, however long, so that they can be copied.
    for name, line in (("folder", summary["folder"]), ("next", _next_command(summary))):
        console.print(f"{name}: {line}", highlight=False, markup=False, soft_wrap=True)


def _next_command(summary: dict[str, Any]) -> str:
    if summary["status"] != "finished":
        return "the same command with resume=true"
    if summary["text"] and summary["objective"] == "causal":
        return f'python -m zoo generate model={summary["folder"]} prompt="def "'
    other = BASELINE if summary["arch"] != BASELINE else DEFAULT_ARCH
    objective = "" if summary["objective"] == "causal" else f" objective={summary['objective']}"
    return f"python -m zoo.train arch={other} data={summary['data']}{objective}"
