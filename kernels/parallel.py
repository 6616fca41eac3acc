"""Runs a compiled kernel over independent tasks on the CPU cores that torch may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

# Below this many inner-loop elements (about 0.1 ms) waking other threads costs more than it saves.
SMALL = 1 << 19

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None


# A forked child has the pool object but none of its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def run(kernel: Callable[..., None], tasks: int, elements: int, *args: Any) -> None:
    """Calls `kernel(first, last, *args)` until every task in `range(tasks)` is done once.

    Args:
        kernel: Must release the GIL and write, per task, memory that no other task writes. Then the result does not
            depend on the number of threads.
        tasks: How many tasks there are.
        elements: Amount of work in all tasks together, in inner-loop elements; a small amount runs in this thread.
        *args: Passed through.
    """
    threads = min(torch.get_num_threads(), tasks)
    if threads == 1 or elements < SMALL:
        kernel(0, tasks, *args)
        return

    # More pieces than threads, taken one at a time: a core that is slowed by another process gets fewer of them.
    pieces = min(tasks, 4 * threads)
    bounds = iter([(tasks * i // pieces, tasks * (i + 1) // pieces) for i in range(pieces)])

    def work() -> None:
        for first, last in bounds:
            kernel(first, last, *args)

    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="zoo-kernels")
    others = [_pool.submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()
