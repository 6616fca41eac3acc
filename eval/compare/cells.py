"""Trains the cells of a comparison: each is a run of `zoo.train` in a process of its own, several at a time.

A run that crashes or is killed ends its own process only. A process that is forked from one in which everything is
imported already starts in a fraction of the time that a fresh interpreter takes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from zoo.console import INTERRUPTED as INTERRUPTED_STATUS
from zoo.console import run_cli
from zoo.train.cli import translate
from zoo.train.config import as_override, train_config
from zoo.train.folder import RunFolder
from zoo.train.report import is_finished
from zoo.train.run import run

FINISHED, FAILED, OUT_OF_MEMORY = "finished", "failed", "out_of_memory"
INTERRUPTED, MISSING = "interrupted", "missing"
RUNS, LOGS = "runs", "logs"
PRELOADED = [__name__, "datasets", "numba", "torch.utils.tensorboard"]


@dataclass(frozen=True)
class Cell:
    """One training run: a contestant, a learning rate, a seed."""

    label: str
    arch: str
    lr: float
    seed: int
    words: tuple[str, ...]
    """Its other settings, as on the command line of `zoo.train`."""

    @property
    def name(self) -> str:
        """Of its folder; `sweep` writes the same one as a pattern."""
        return f"{self.label}-lr{self.lr}-s{self.seed}"

    def overrides(self, folder: Path) -> list[str]:
        """All of its settings."""
        return [*self.words, f"optim.lr={self.lr}", f"seed={self.seed}", *place(folder, self.name)]


@dataclass(frozen=True)
class Outcome:
    """How a cell ended."""

    status: str
    reason: str = ""


def place(folder: Path, name: str) -> list[str]:
    """Where a run of that name goes, and that it goes on there."""
    return [f"name={as_override(name)}", f"runs_dir={as_override(str(folder / RUNS))}", "resume=true"]


def run_folder(folder: Path, cell: Cell) -> RunFolder:
    """Where the run of a cell is."""
    return RunFolder(folder / RUNS / cell.name)


def log_file(folder: Path, name: str) -> Path:
    """What a process printed."""
    return folder / LOGS / f"{name}.log"


def train_cells(
    cells: Sequence[Cell],
    folder: Path,
    *,
    jobs: int,
    threads: int,
    devices: Sequence[str] = (),
    begun: Callable[[Cell], None] = lambda cell: None,
    ended: Callable[[Cell, Outcome], None] = lambda cell, outcome: None,
) -> None:
    """Trains cells that are not finished; those that were begun go on where they stopped.

    Args:
        cells: The cells.
        folder: Of the comparison; the runs go into `runs/`, what they print into `logs/`.
        jobs: How many run at a time.
        threads: Of each of them.
        devices: GPUs to share out, as CUDA_VISIBLE_DEVICES names them; none: whatever a process finds.
        begun: Told of each cell that begins.
        ended: Told how each one ended. What it raises ends all.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM. Before it leaves, all processes have saved their runs and ended.
    """
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    waiting, running = deque(cells), dict[int, tuple[Cell, BaseProcess]]()
    context = _context()
    with _threads_at_import(threads):
        try:
            while waiting or running:
                free = [slot for slot in range(jobs) if slot not in running]
                for slot in free[: len(waiting)]:
                    cell = waiting.popleft()
                    device = devices[slot % len(devices)] if devices else None
                    process = context.Process(target=_work, args=(cell, folder, threads, device))
                    running[slot] = (cell, process)  # before it starts: a signal may come in between
                    begun(cell)
                    process.start()
                wait([process.sentinel for _, process in running.values()])
                for slot, (cell, process) in list(running.items()):
                    if not process.is_alive():
                        process.join()
                        del running[slot]
                        ended(cell, outcome(folder, cell, process.exitcode))
        finally:
            _end([process for _, process in running.values()])


def outcome(folder: Path, cell: Cell, exitcode: int | None, log: Path | None = None) -> Outcome:
    """How a cell ended, by the exit status of its process, the summary of its run, and what it printed last.

    Args:
        folder: Of the comparison.
        cell: The cell.
        exitcode: As multiprocessing gives it: negative for a signal.
        log: What was printed; the cell's own unless said.
    """
    summary = run_folder(folder, cell).read_summary() or {}
    if exitcode == 0 and is_finished(summary):
        return Outcome(FINISHED)
    if exitcode == INTERRUPTED_STATUS or exitcode == -signal.SIGTERM:
        return Outcome(INTERRUPTED)
    if exitcode is not None and exitcode < 0:
        number = -exitcode
        if number == getattr(signal, "SIGKILL", None):
            return Outcome(OUT_OF_MEMORY, "killed by the system, as it does where memory runs out")
        with contextlib.suppress(ValueError):
            return Outcome(FAILED, f"ended by {signal.Signals(number).name}")
    reason = str(summary["error"]) if summary.get("status") == FAILED else last_line(log or log_file(folder, cell.name))
    status = OUT_OF_MEMORY if "out of memory" in reason else FAILED
    return Outcome(status, reason or f"ended with status {exitcode}")


def last_line(path: Path) -> str:
    """The last line that says anything, without the word that marks an error."""
    with contextlib.suppress(OSError):
        lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "").removeprefix("error: ")
    return ""


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():  # Windows
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@contextlib.contextmanager
def _threads_at_import(threads: int) -> Iterator[None]:
    """Numbers of threads that libraries read when they are imported. One for BLAS: a fork must not lose any."""
    wanted = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _end(processes: Sequence[BaseProcess]) -> None:
    """Asks processes to save and end, and waits; a second Ctrl-C ends them at once."""
    started = [process for process in processes if process.pid is not None]
    try:
        for process in started:
            process.terminate()
        for process in started:
            process.join()
    except KeyboardInterrupt:
        for process in started:
            process.kill()
        raise


def _work(cell: Cell, folder: Path, threads: int, device: str | None) -> None:
    """One cell; the process that does it ends with the exit status of `zoo.train`."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C is for the parent, which asks this process to end, once
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log = log_file(folder, cell.name)
    with log.open("w", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    torch.set_num_threads(threads)
    # A process that an earlier comparison left behind may still be saving this run.
    with FileLock(log.with_suffix(".lock")):
        sys.exit(run_cli(lambda: _train(cell, folder), translate))


def _train(cell: Cell, folder: Path) -> None:
    words, target = cell.overrides(folder), run_folder(folder, cell)
    if target.path.exists() and target.read_config() is None:
        shutil.rmtree(target.path)  # killed before it had settings, and so before it had anything
    run(train_config(words), command=shlex.join(["python", "-m", "zoo.train", *words]))


def _end_with_parent() -> None:
    """Where the parent is killed, nobody would ask for the run to end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
