"""Time, memory and machine facts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec

import pytest
import torch

from zoo.eval.measure import machine_info, median_time, peak_memory_bytes
from zoo.kernels.errors import ZooError

MIB = 2**20


def hold(mebibytes: int) -> Callable[[], object]:
    """Inputs of 64 MiB that must not count, and a call that needs `mebibytes` more."""
    inputs = torch.ones(64 * MIB // 4)
    return lambda: torch.ones(mebibytes * MIB // 4) + inputs[0]


def fail() -> Callable[[], object]:
    raise SystemExit(3)


def test_machine_info_can_be_written_and_names_the_hardware() -> None:
    info = json.loads(json.dumps(machine_info()))
    assert info["versions"]["torch"] == torch.__version__
    assert info["threads"] == torch.get_num_threads()
    assert info["device"].startswith("cpu: ")
    assert {"cores", "memory_bytes", "platform", "command", "git_commit", "instructions"} <= info.keys()


@pytest.mark.parametrize(
    ("argv", "module", "command"),
    [
        (["/home/me/zoo/compare.py", "arch=mamba"], "zoo.compare", "python -m zoo.compare arch=mamba"),
        (
            ["/zoo/eval/__main__.py", "model=my runs/a"],
            "zoo.eval.__main__",
            "python -m zoo.eval 'model=my runs/a'",
        ),
        (["zoo compare", "seeds=3"], "zoo.__main__", "python -m zoo compare seeds=3"),
        (["benchmarks/chunked.py"], None, "python benchmarks/chunked.py"),
    ],
)
def test_the_command_can_be_typed_elsewhere(
    argv: list[str], module: str | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec(module, None) if module else None)
    assert machine_info()["command"] == command


def test_median_time_leaves_the_warm_up_out() -> None:
    calls = []

    def slow_at_first() -> None:
        calls.append(None)
        time.sleep(0.2 if len(calls) <= 2 else 0.002)

    times = median_time(slow_at_first, repeats=5, warmup=2)
    assert len(calls) == 7
    assert times["repeats"] == 5
    assert 0.002 <= times["min"] <= times["median"] <= times["max"]
    assert times["median"] < 0.1


def test_peak_memory_counts_the_call_and_not_its_inputs() -> None:
    # The sum needs its operand and its result at once; the allocator and the thread pool add a little.
    assert 2 * 40 * MIB <= peak_memory_bytes(hold, 40) < 2 * 40 * MIB + 16 * MIB


def test_peak_memory_reports_a_process_that_dies(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZooError, match="ended with exit code 3"):
        peak_memory_bytes(fail)
