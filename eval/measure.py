"""How the zoo measures: time with its spread, memory in a process of its own, and the facts of the machine."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from zoo.eval.child import Child
from zoo.memory import PeakMemory, synchronize
from zoo.train.environment import describe_device, git_commit, versions

CPU = torch.device("cpu")
WIDTH = 110
"""Columns of tables, also where the terminal has fewer: a figure that is cut off is none."""


def machine_info(device: torch.device = CPU) -> dict[str, Any]:
    """Returns what a reader needs to judge or repeat a figure: hardware, versions, command, commit."""
    return {
        "device": describe_device(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": _total_memory(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "git_commit": git_commit(),
        "command": _command(),
    }


def _command() -> str:
    """What was typed, such that it can be typed elsewhere: modules by their names, not by their places here."""
    program, *words = sys.argv
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if program.startswith("zoo "):  # a verb of `zoo.cli`
        program = f"-m {program}"
    elif module is not None:
        program = f"-m {module.name.removesuffix('.__main__')}"
    return " ".join(["python", program, shlex.join(words)]).strip()


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows
        return None


def median_time(
    function: Callable[[], Any], *, repeats: int = 10, warmup: int = 2, device: torch.device = CPU
) -> dict[str, Any]:
    """Times calls one by one, after some that do not count.

    Args:
        function: What to time.
        repeats: Calls that count.
        warmup: Calls before: compilation, first allocation, caches.
        device: Waited for before and after each call.

    Returns:
        `median`, `min`, `max` in seconds, and `repeats`.
    """
    for _ in range(warmup):
        function()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return spread(seconds)


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """`median`, `min` and `max` of some times, and `repeats`, how many they are."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "repeats": len(seconds)}


def in_words(seconds: Mapping[str, Any]) -> str:
    """A spread in milliseconds: "4.31 (4.2..5.02)"."""

    def digits(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    low, middle, high = (digits(1e3 * seconds[key]) for key in ("min", "median", "max"))
    return f"{middle} ({low}..{high})"


def peak_memory_bytes(prepare: Callable[..., Callable[[], Any]], *args: Any, device: torch.device = CPU) -> int:
    """Measures how much memory a call needs beyond its inputs, in a fresh process.

    Args:
        prepare: `prepare(*args)` makes the inputs, loads and compiles what is needed, and returns the call to measure.
            It and its arguments must be importable and picklable, because another process runs them.
        *args: See `prepare`.
        device: On a CPU the resident set is measured, on a GPU the allocator.

    Returns:
        Peak during the call minus what was held just before it, in bytes.
    """
    with Child() as child:
        return child.call(_measure_memory, device, prepare, args)


def _measure_memory(device: torch.device, prepare: Callable[..., Callable[[], Any]], args: tuple[Any, ...]) -> int:
    function = prepare(*args)
    memory = PeakMemory(device)
    memory.reset()
    before = memory.bytes()
    function()
    synchronize(device)
    return memory.bytes() - before
