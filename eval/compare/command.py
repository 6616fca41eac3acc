"""`python -m zoo.compare`: trains the chosen architectures on one dataset, measures them, and writes the report."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from zoo.console import run_cli
from zoo.eval import report
from zoo.eval.bench import BenchSettings, bench
from zoo.eval.bench.cost import MakeModel
from zoo.eval.compare import results
from zoo.eval.compare.cells import FAILED, FINISHED, OUT_OF_MEMORY, Cell, Outcome, run_folder, train_cells
from zoo.eval.compare.comparison import BENCH, Book, disk_is_full, opened
from zoo.eval.compare.config import CompareConfig, Words, read_words
from zoo.eval.compare.models import evaluate_models
from zoo.eval.compare.plan import STOP_AT, Plan, describe, make_plan
from zoo.eval.compare.results import Row
from zoo.eval.compare.sweeps import sweep_cells
from zoo.kernels.errors import ZooError
from zoo.model import create_model
from zoo.settings import describe_settings
from zoo.train.errors import foreseen
from zoo.train.folder import replace_text
from zoo.train.report import is_finished
from zoo.train.run import pick_device

WIDTH = 110
LONGER = [256, 1_024, 4_096]
DEBUG_BENCH = {"lengths": [64, 256], "repeats": 2, "batch_tokens": 512, "max_seconds": 5.0, "crossovers": 5.0}


def main() -> int:
    """Runs the command line; returns the exit status."""
    return run_cli(_main, foreseen)


def _main() -> None:
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        _print_help()
        return
    config, words = read_words(arguments)
    with _stoppable():
        compare(config, words, Console())


def compare(config: CompareConfig, words: Words, console: Console) -> Path:
    """Compares, or goes on with a comparison that was cut short.

    Args:
        config: The settings.
        words: Those of data, trainer, optimiser and single architectures.
        console: Where to print.

    Returns:
        Path of the report.

    Raises:
        ConfigError, DataError, CheckpointError: The settings do not fit together, the data, models, or an earlier
            comparison in the folder.
        RunError: The disk is full.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what is known so far is written.
    """
    if config.models is not None:
        told, evaluated, makers, device = evaluate_models(config, words, console)
        name = config.name or f"{told['data']['name']}-models"
        with opened(Path(config.folder) / name, told) as book:
            book.save(evaluated)
            return _finish(book, config, evaluated, makers, device, console)
    plan = make_plan(config, words)
    with opened(Path(config.folder) / plan.name, describe(plan)) as book:
        rows = _train(plan, book, console)
        makers = [(who.label, functools.partial(create_model, who.arch, **who.settings)) for who in plan.contestants]
        device = pick_device(plan.base.trainer.accelerator)
        return _finish(book, config, rows, makers, device, console)


def _train(plan: Plan, book: Book, console: Console) -> list[Row]:
    """Trains what is not finished; the rows of all cells."""
    config, folder, cells = plan.config, book.folder, plan.cells
    outcomes = {cell: Outcome(FINISHED) for cell in cells if is_finished(run_folder(folder, cell).read_summary())}
    pending = [cell for cell in cells if cell not in outcomes]

    def rows() -> list[Row]:
        done = [cell for cell in cells if cell in outcomes and outcomes[cell].status == FINISHED]
        results.check_batches((cell.name, cell.seed, run_folder(folder, cell).read_summary() or {}) for cell in done)
        found = [results.cell_row(folder, cell, outcomes.get(cell), plan.metric) for cell in cells]
        results.choose(found, plan.metric, higher_is_better=plan.higher_is_better)
        return found

    book.save(rows())
    jobs, threads, devices = _resources(plan)
    many = f"{len(plan.contestants)} architectures, {len(cells)} runs on {plan.source.name}"
    where = f"by {config.launcher}" if config.launcher else f"{jobs} at a time"
    console.print(f"{many}, {where}: {folder}" + (f" ({len(cells) - len(pending)} are finished)" if outcomes else ""))
    with _Progress(console, len(cells), len(outcomes)) as progress:

        def ended(cell: Cell, outcome: Outcome) -> None:
            if outcome.status == FAILED and "the disk is full" in outcome.reason:
                raise disk_is_full(folder)
            outcomes[cell] = outcome
            book.save(rows())
            progress.ended(cell, outcome, run_folder(folder, cell).read_summary() or {}, plan.metric)

        try:
            if config.launcher is None:
                train_cells(pending, folder, jobs=jobs, threads=threads, devices=devices, ended=ended)
            else:
                left = {cell.label for cell in pending}
                sweeps = [cell for cell in cells if cell.label in left]
                options = plan.words.launcher
                sweep_cells(
                    sweeps, folder, launcher=config.launcher, options=options, jobs=config.jobs,
                    threads=config.threads, ended=ended,
                )  # fmt: skip
        except KeyboardInterrupt:
            book.save(rows())
            count = sum(outcome.status == FINISHED for outcome in outcomes.values())
            raise KeyboardInterrupt(
                f"interrupted: {count} of {len(cells)} runs are finished; the same command goes on in {folder}"
            ) from None
    return rows()


def _finish(
    book: Book,
    config: CompareConfig,
    rows: Sequence[Row],
    makers: Sequence[tuple[str, MakeModel]],
    device: torch.device,
    console: Console,
) -> Path:
    """Measures speed and memory, writes the report, and prints what came out."""
    if config.bench:
        _measure(book, config, makers, device, functools.partial(console.print, highlight=False, soft_wrap=True))
    book.save(finished=True)
    page = report.write(book.folder)
    console.width = max(console.width, WIDTH)  # a figure cut off is none
    console.print(_table(book.told, rows, config.solved_at))
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return page


def _measure(
    book: Book,
    config: CompareConfig,
    makers: Sequence[tuple[str, MakeModel]],
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Writes speed and memory against length, unless they were measured at these lengths already."""
    target = book.folder / BENCH
    lengths = config.lengths or [book.told["data"]["length"], *LONGER]
    chosen: dict[str, Any] = {"lengths": lengths, "device": device.type}
    if config.trainer == "debug":
        chosen |= DEBUG_BENCH | ({"lengths": config.lengths} if config.lengths else {})
    settings = BenchSettings(**chosen)
    earlier = _lengths_measured(target)
    if earlier == settings.lengths:
        return
    again = "" if earlier is None else f" anew: {BENCH} has lengths {earlier}, and asked for are {settings.lengths}"
    say(f"measuring speed and memory against length{again}")
    try:
        replace_text(target, json.dumps(bench(makers, settings, say=say), indent=2) + "\n")
    except ZooError as error:  # the results of training stand without it
        say(f"speed and memory could not be measured: {error}")


def _lengths_measured(path: Path) -> list[int] | None:
    """Those in a bench.json, from the shortest on; None where there is no file that tells."""
    try:
        return sorted({row["length"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]})
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _resources(plan: Plan) -> tuple[int, int, list[str]]:
    """Runs at a time, threads of each, and GPUs to share out."""
    config = plan.config
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if pick_device(plan.base.trainer.accelerator).type == "cpu":
        threads = config.threads or 1
        return config.jobs or max(1, cores // threads), threads, []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    jobs = config.jobs or len(devices)
    return jobs, config.threads or max(1, cores // jobs), devices


class _Progress:
    """A bar over the cells with the time left, and a line for each that ends."""

    def __init__(self, console: Console, total: int, finished: int) -> None:
        columns = (TextColumn("runs"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=total, completed=finished)
        self._total, self._done, self._here = total, finished, 0
        self._begun = time.monotonic()

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def ended(self, cell: Cell, outcome: Outcome, summary: dict[str, Any], metric: str) -> None:
        """One more."""
        self._done, self._here = self._done + 1, self._here + 1
        self._bar.update(self._task, completed=self._done)
        if outcome.status == FINISHED:
            score = summary["metrics"]["test"].get(metric, float("nan"))
            told = f"{metric} {score:.4f} in {summary['wall_seconds']:,.0f} s"
        else:
            told = f"{outcome.status.replace('_', ' ')}: {outcome.reason}"
        minutes, seconds = divmod(round((time.monotonic() - self._begun) / self._here * (self._total - self._done)), 60)
        left = f"; {minutes}:{seconds:02d} left" if self._done < self._total else ""
        line = f"{self._done}/{self._total}  {cell.label}, lr {cell.lr:g}, seed {cell.seed}: {told}{left}"
        self._bar.console.print(line, highlight=False, soft_wrap=True, markup=False)


def _table(told: dict[str, Any], rows: Sequence[Row], solved_at: float) -> Table:
    """What came out, a row per contestant."""
    metric = told["metric"]["name"]
    table = Table(title=f"{told['data']['name']}: {metric} on test data", title_justify="left")
    table.add_column("", no_wrap=True)
    solves = metric == "acc"
    for head in ("median", "min..max", *(["solved"] if solves else []), "lr", "parameters", "state", "tokens/s"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("failed", overflow="fold")
    for entry in told["architectures"]:
        own = [row for row in rows if row["label"] == entry["label"]]
        chosen = [row for row in own if row["chosen"]]
        finished = [row for row in chosen if row["status"] == FINISHED]
        scores = [row[f"test_{metric}"] for row in finished if row.get(f"test_{metric}") is not None]
        solved = [f"{sum(score >= solved_at for score in scores)} of {len(chosen)}"] if solves else []
        speeds = [row["tokens_per_second"] for row in finished if row.get("tokens_per_second")]
        failed = [row for row in own if row["status"] in (FAILED, OUT_OF_MEMORY)]
        table.add_row(
            entry["label"],
            f"{statistics.median(scores):.4f}" if scores else "",
            f"{min(scores):.4f}..{max(scores):.4f}" if scores else "",
            *solved,
            f"{chosen[0]['lr']:g}" if chosen and "lr" in chosen[0] else "",
            f"{entry['params']:,}",
            f"{entry['state_bytes'][str(told['data']['length'])]:,} B",
            f"{statistics.median(speeds):,.0f}" if speeds else "",
            f"{len(failed)}: {failed[0]['reason']}" if failed else "",
        )
    return table


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM is as Ctrl-C."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_help() -> None:
    print("usage: zoo compare [arch=mamba,transformer] [data=mqar] [key=value ...]\n")
    for name, default, text in describe_settings(CompareConfig):
        print(f"  {name:<10} {text}" + (f" [{default}]" if default else ""))
    print(
        f"\ndata.KEY, trainer.KEY and optim.KEY are as `zoo train --help` has them; arch.NAME.KEY sets one"
        f"\narchitecture, as in arch.mamba.d_state=32, and the budget leaves it alone. Runs stop at a validation"
        f"\naccuracy of {STOP_AT} unless trainer.stop_at says otherwise. The same command goes on with a comparison"
        f"\nthat was cut short."
    )


if __name__ == "__main__":
    sys.exit(main())
