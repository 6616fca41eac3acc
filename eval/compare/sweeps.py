"""Trains the cells of a comparison by one of Hydra's launchers: a sweep of `zoo.train` for each contestant."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from zoo.eval.compare.cells import LOGS, Cell, Outcome, log_file, outcome, place

POLL_SECONDS = 0.2


def sweep_cells(
    cells: Sequence[Cell],
    folder: Path,
    *,
    launcher: str,
    options: Sequence[str] = (),
    jobs: int | None = None,
    threads: int | None = None,
    begun: Callable[[Cell], None] = lambda cell: None,
    ended: Callable[[Cell, Outcome], None] = lambda cell, outcome: None,
) -> None:
    """Trains cells, each contestant's learning rates and seeds in one sweep.

    How many of its runs go at a time is the launcher's matter. A run that has finished already ends at once.

    Args:
        cells: The cells; those of one contestant are the product of its learning rates and seeds.
        folder: Of the comparison, where the runs can write too.
        launcher: Name, as in `hydra/launcher=...`.
        options: Its settings, as in `hydra.launcher.partition=gpu`.
        jobs: How many sweeps go at a time; None: all.
        threads: Of each run; None: what the launcher gives it.
        begun: Told of each cell whose sweep begins.
        ended: Told how each cell ended, when its sweep has. What it raises ends all.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the sweeps are asked to end.
    """
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    waiting = deque((label, list(group)) for label, group in groupby(cells, key=lambda cell: cell.label))
    running: list[tuple[subprocess.Popen[bytes], list[Cell]]] = []
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    try:
        while waiting or running:
            while waiting and (jobs is None or len(running) < jobs):
                label, group = waiting.popleft()
                for cell in group:
                    begun(cell)
                with log_file(folder, label).open("w", encoding="utf-8") as log:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "zoo.train", "-m", *_words(folder, group, launcher, options)],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=environment,
                        start_new_session=True,  # Ctrl-C is for this process, which asks that one to end
                    )
                running.append((process, group))
            for process, group in [pair for pair in running if pair[0].poll() is not None]:
                running.remove((process, group))
                for cell in group:
                    # The sweep's own status says nothing of one run; its summary does.
                    stopped = process.returncode == -signal.SIGTERM
                    ended(
                        cell, outcome(folder, cell, process.returncode if stopped else 0, log_file(folder, cell.label))
                    )
            time.sleep(POLL_SECONDS)
    finally:
        for process, _ in running:
            process.terminate()
        for process, _ in running:
            process.wait()


def _words(folder: Path, cells: Sequence[Cell], launcher: str, options: Sequence[str]) -> list[str]:
    first = cells[0]
    lrs, seeds = dict.fromkeys(str(cell.lr) for cell in cells), dict.fromkeys(str(cell.seed) for cell in cells)
    pattern = f"{first.label}-lr${{optim.lr}}-s${{seed}}"  # as `Cell.name`
    sweep = [f"optim.lr={','.join(lrs)}", f"seed={','.join(seeds)}", f"hydra/launcher={launcher}", *options]
    return [*first.words, *place(folder, pattern), *sweep]
