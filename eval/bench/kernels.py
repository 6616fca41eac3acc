"""`python -m zoo.bench kernels`: each operator's backends against each other, the reference and other people's code.

Nothing is timed before it gives the outputs and gradients of the reference in float64.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from zoo.command import usable_device
from zoo.eval.bench.cost import DTYPES, FAILED, OK, TOO_SLOW, verdict
from zoo.eval.bench.kernel_cases import CASES, Case, Draw, Inputs
from zoo.eval.measure import WIDTH, in_words, machine_info, spread
from zoo.kernels import backends
from zoo.kernels.errors import BackendError, did_you_mean
from zoo.memory import synchronize
from zoo.settings import Settings, describe_settings, parse_overrides, setting

OWNER = "zoo bench kernels"
REFERENCE = "reference"
SMALL = (2, 70)
"""Batch and length at which contenders must agree with the reference; no multiple of any block."""
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Relative root mean square error of the worst output or gradient."""
PATIENCE = 10
"""Contenders that would need so many times the seconds of a measurement for one call are not called."""
PASSES = ("forward", "forward_backward")
Contender = Callable[[Inputs], Tensor]
MakeCase = Callable[[Draw, int, int], Case]


@dataclass(kw_only=True)
class KernelSettings(Settings):
    """What is timed, and how."""

    operators: list[str] | None = setting(None, "operators, as in ssd,wkv7; null: all")
    lengths: list[int] = setting([512, 2048], "tokens of a sequence")
    batch: int = setting(2, "sequences", minimum=1)
    device: str = setting("cpu", "cpu, cuda, cuda:1, ...")
    dtype: str = setting("fp32", "fp32 or bf16", choices=tuple(DTYPES))
    rounds: int = setting(10, "times of each contender, in turn", minimum=1)
    seconds: float = setting(1.0, "seconds after which a contender is not called again", above=0)
    out: str | None = setting(None, "file for the results, .json")

    def __post_init__(self) -> None:
        super().__post_init__()
        usable_device(self.device)
        known = [operator.name for operator in backends.operators()]
        for name in self.operators or ():
            if name not in known:
                self.fail("operators", did_you_mean(name, known))
        if not self.lengths or min(self.lengths) < 1:
            self.fail("lengths", "expected at least one length, all of at least 1")
        self.lengths = sorted({*self.lengths})
        if self.out is not None and not Path(self.out).absolute().parent.is_dir():
            self.fail("out", "there is no such folder: make it first")


def bench_kernels(settings: KernelSettings, say: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """Times every backend that can run here, and every peer that is installed.

    Returns:
        A row for each case, length and contender: `case`, `operator`, `contender`, `peer` (whether it is other people's
        code), `batch`, `length`, `error` (against float64), `forward` and `forward_backward` (seconds: median, min,
        max, repeats), `over_reference` and `over_peer` (how many times as fast, with backward, as the reference and as
        the fastest peer; None where there is none), `status`, `reason`.
    """
    device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    rows = []
    for name, (operator, make) in CASES.items():
        if settings.operators is not None and operator not in settings.operators:
            continue
        verdicts = _gate(operator, make, device, dtype)
        before: list[dict[str, Any]] = []
        for length in settings.lengths:
            say(f"{name}, {settings.batch} x {length:,} tokens: {', '.join(verdicts)}")
            case = make(Draw(device, dtype), settings.batch, length)
            found = {who: own | _slow(who, before, length, settings) for who, own in verdicts.items()}
            contenders = _contenders(operator, case, device)
            ready = {who: contenders[who] for who, own in found.items() if own["status"] == OK}
            times = _in_turn(ready, case.inputs, settings)
            common = {"case": name, "operator": operator, "batch": settings.batch, "length": length}
            before = [
                common | {"contender": who, "peer": who in case.peers} | own | times.get(who, {})
                for who, own in found.items()
            ]
            rivals = {
                "over_reference": [row for row in before if row["contender"] == REFERENCE],
                "over_peer": [row for row in before if row["peer"]],
            }
            rows += [row | {key: _ratio(row, others) for key, others in rivals.items()} for row in before]
    return rows


def _slow(who: str, before: Sequence[dict[str, Any]], length: int, settings: KernelSettings) -> dict[str, str]:
    """Whether a contender is not to be tried, by its time at the length before."""
    for row in before:
        if row["contender"] == who and row["status"] == TOO_SLOW:
            return {"status": TOO_SLOW, "reason": row["reason"]}
        if row["contender"] == who and row["status"] == OK:
            estimate = row["forward_backward"]["median"] * length / row["length"]
            if estimate > PATIENCE * settings.seconds:
                return {"status": TOO_SLOW, "reason": f"would take {estimate:.3g} seconds or more"}
    return {}


def _ratio(row: dict[str, Any], others: Sequence[dict[str, Any]]) -> float | None:
    """How many times as fast a contender is as the fastest of others."""
    times = [other["forward_backward"]["median"] for other in others if other["status"] == OK]
    return min(times) / row["forward_backward"]["median"] if times and row["status"] == OK else None


def _contenders(operator: str, case: Case, device: torch.device) -> dict[str, Contender]:
    """What may be timed on this device, by name."""
    able = next(verdicts for name, _, verdicts in backends.describe(device.type) if name == operator)
    found: dict[str, Contender] = {backend: case.on(backend) for backend, reason in able if reason is None}
    peers = {name: call for name, (package, call) in case.peers.items() if backends.missing(package, package) is None}
    return found | peers


def _gate(operator: str, make: MakeCase, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """For each contender `status`, `reason` and `error`, its worst one; those that refuse the case are left out."""
    exact = make(Draw(device, dtype, exact=True), *SMALL)
    truth = _results(exact.on(REFERENCE), exact.inputs)
    case = make(Draw(device, dtype), *SMALL)
    found: dict[str, dict[str, Any]] = {}
    for who, call in _contenders(operator, case, device).items():
        try:
            results = _results(call, case.inputs)
        except BackendError:
            continue
        except Exception as error:
            status, reason = verdict(error)
            found[who] = {"status": status, "reason": reason, "error": None}
            continue
        errors = {name: float((x.double() - truth[name]).norm() / truth[name].norm()) for name, x in results.items()}
        worst = max(errors, key=lambda name: errors[name])
        right = errors[worst] <= TOLERANCES[dtype]  # NaN is not
        wrong = f"{worst} differs from the reference by {errors[worst]:.1e}: not timed"
        found[who] = {"status": OK, "reason": None} if right else {"status": FAILED, "reason": wrong}
        found[who]["error"] = errors[worst]
    return found


def _results(call: Contender, inputs: Inputs) -> dict[str, Tensor]:
    """The output and all gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y = call(leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), torch.cos(torch.arange(y.numel())).view_as(y).to(y))
    return {"the output": y.detach(), **{f"the gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}}


def _in_turn(contenders: dict[str, Contender], inputs: Inputs, settings: KernelSettings) -> dict[str, dict[str, Any]]:
    """For each contender the seconds of both passes, or the status and reason of its failure."""
    device = torch.device(settings.device)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    found: dict[str, dict[str, Any]] = {who: {} for who in contenders}

    def forward(who: str) -> None:
        with torch.no_grad():
            contenders[who](inputs)

    def forward_backward(who: str) -> None:
        y = contenders[who](leaves)
        torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))

    def timed(call: Callable[[str], None], who: str) -> float:
        synchronize(device)
        begun = time.perf_counter()
        call(who)
        synchronize(device)
        return time.perf_counter() - begun

    for call in (forward, forward_backward):
        seconds: dict[str, list[float]] = {}
        for turn in range(-1, settings.rounds):  # the first one warms up
            for who in list(contenders)[:: -1 if turn % 2 else 1]:
                if "status" in found[who] or sum(seconds.get(who, [])) > settings.seconds:
                    continue
                try:
                    value = timed(call, who)
                except Exception as error:
                    found[who] = dict(zip(("status", "reason"), verdict(error), strict=True))
                    continue
                if turn >= 0 or value > settings.seconds:  # that long, a first call is a time too
                    seconds.setdefault(who, []).append(value)
        for who, values in seconds.items():
            found[who][call.__name__] = spread(values)
    return found


def main(arguments: Sequence[str]) -> None:
    """Prints a table for each case."""
    if "--help" in arguments or "-h" in arguments:
        print("usage: zoo bench kernels [operators=ssd,wkv7] [key=value ...]\n")
        for name, default, text in describe_settings(KernelSettings):
            print(f"  {name:<10} {text}" + (f" [{default}]" if default else ""))
        return
    settings = parse_overrides(KernelSettings, arguments, OWNER)
    console, progress = Console(), Console(stderr=True)
    console.width = max(console.width, WIDTH)
    rows = bench_kernels(settings, say=lambda line: progress.print(line, soft_wrap=True, highlight=False))
    for name in dict.fromkeys(row["case"] for row in rows):
        console.print(_table(name, [row for row in rows if row["case"] == name], settings))
    if settings.out is not None:
        told = {"machine": machine_info(torch.device(settings.device)), "dtype": settings.dtype, "rows": rows}
        Path(settings.out).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        console.print(f"wrote {settings.out}", soft_wrap=True, highlight=False)


def _table(name: str, rows: Sequence[dict[str, Any]], settings: KernelSettings) -> Table:
    table = Table(title=f"{name}, {settings.batch} sequences, {settings.dtype}", title_justify="left")
    for head in ("T", "backend or peer", "forward, ms", "with backward, ms", "of reference", "of peer", "error"):
        table.add_column(head, justify="left" if head == "backend or peer" else "right", no_wrap=True)
    for i, row in enumerate(rows):
        first = i == 0 or row["length"] != rows[i - 1]["length"]
        if first and i:
            table.add_section()
        times = [in_words(row[key]) if row["status"] == OK else row["status"].replace("_", " ") for key in PASSES]
        ratios = ["" if row[key] is None else f"{row[key]:,.2f}x" for key in ("over_reference", "over_peer")]
        error = "" if row["error"] is None else f"{row['error']:.0e}"
        table.add_row(f"{row['length']:,}" if first else "", row["contender"], *times, *ratios, error)
    return table
