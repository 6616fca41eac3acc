"""What models cost against length, measured, and where one overtakes another: the command stands in `command`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zoo.eval.bench.cost import (
    DTYPES,
    FAILED,
    KINDS,
    OK,
    OUT_OF_MEMORY,
    TOO_SLOW,
    CostSettings,
    Job,
    MakeModel,
    measure,
    race,
)
from zoo.eval.bench.crossover import Bracket, brackets, certainly_better, crossovers, first_length
from zoo.eval.bench.machine import reaches
from zoo.eval.child import Child, ChildEnded, ChildTooSlow, available_memory
from zoo.eval.measure import machine_info
from zoo.kernels.errors import ConfigError, did_you_mean
from zoo.settings import setting

GIB = 2**30
START = 180.0
"""Seconds that a process may take to start and its compilers to run, beyond those that are for measuring."""


@dataclass(kw_only=True)
class BenchSettings(CostSettings):
    """What is measured."""

    lengths: list[int] = setting([256, 1024, 4096], "tokens of a sequence; of decoding, those read before")
    kinds: list[str] = setting([*KINDS], ", ".join(f"{kind} ({words})" for kind, words in KINDS.items()))
    batch_tokens: int = setting(2048, "train and prefill: tokens of a batch; at least one sequence", minimum=1)
    decode_batch: int = setting(1, "sequences that are decoded at once", minimum=1)
    memory: float | None = setting(None, "GiB that a model may take on a CPU; null: what is free at the start", above=0)
    crossovers: float = setting(60.0, "seconds for narrowing crossovers down; a search once begun is ended", minimum=0)
    grid: int = setting(64, "crossovers are searched among multiples of so many tokens", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lengths or min(self.lengths) < 1:
            self.fail("lengths", "expected at least one length, all of at least 1")
        for kind in self.kinds or [""]:
            if kind not in KINDS:
                self.fail("kinds", did_you_mean(kind, KINDS))
        self.lengths, self.kinds = sorted({*self.lengths}), list(dict.fromkeys(self.kinds))

    def cost(self) -> CostSettings:
        """How costs are measured: plain, for other processes, to which a command's own class would be unknown."""
        fields = dataclasses.fields(CostSettings)
        return CostSettings(**{field.name: getattr(self, field.name) for field in fields})

    def job(self, kind: str, length: int) -> Job:
        """What is measured at that length."""
        return Job(kind, length, self.decode_batch if kind == "decode" else max(1, self.batch_tokens // length))


def bench(
    models: Sequence[tuple[str, MakeModel]],
    settings: BenchSettings | None = None,
    *,
    first: str | None = "transformer",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures what models cost against length, and where one overtakes another.

    Each model is measured in a process of its own. Where one runs out of memory or time, that is its row, and the
    longer lengths of that kind are not tried.

    Args:
        models: Label and maker of each; makers are picklable (see `MakeModel`).
        settings: What is measured, and how.
        first: Label whose crossovers are looked for first, as time for them may run out.
        say: Told each result, a line of text.

    Returns:
        `machine`; `reaches`, what shares refer to; `rows`; `crossovers`. All of it can be written as JSON.
    """
    settings = settings or BenchSettings()
    labels = [label for label, _ in models]
    if len({*labels}) < len(labels):
        raise ConfigError(f"labels {labels} repeat: give each model its own")
    device = torch.device(settings.device)
    limits = reaches(device, DTYPES[settings.dtype])
    say(
        f"this machine reaches {limits['matmul_gflops']:,.0f} GFLOP/s in matrix products and copies "
        f"{limits['copy_gbytes_per_second']:,.1f} GB/s"
    )
    rows = [row for label, make_model in models for row in _series(label, make_model, settings, limits, say)]
    found = _crossovers(dict(models), rows, settings, first, say)
    return {"machine": machine_info(device), "reaches": limits, "rows": rows, "crossovers": found}


def _series(
    label: str, make_model: MakeModel, settings: BenchSettings, limits: dict[str, float], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The rows of one model."""
    rows = []
    with _Measurer(settings) as measurer:
        for kind in settings.kinds:
            stopped: dict[str, Any] | None = None
            for length in settings.lengths:
                job = settings.job(kind, length)
                if stopped is None:
                    result = measurer.measure(make_model, job)
                else:
                    result = {"status": stopped["status"], "reason": f"not tried: so it was at {stopped['length']:,}"}
                row = _row(label, job, result, limits)
                rows.append(row)
                say(_line(row))
                if row["status"] != OK and stopped is None:
                    stopped = row
    return rows


class _Measurer:
    """Makes calls in a process of their own, and in a new one where the last one ended."""

    def __init__(self, settings: BenchSettings) -> None:
        self.settings = settings
        self.child: Child | None = None
        self.memory: int | None = None
        if torch.device(settings.device).type == "cpu":
            self.memory = available_memory() if settings.memory is None else int(settings.memory * GIB)

    def __enter__(self) -> _Measurer:
        return self

    def __exit__(self, *_: object) -> None:
        if self.child is not None:
            self.child.close()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """As `Child.call`."""
        self.child = self.child or Child(self.memory)
        try:
            return self.child.call(function, *args, timeout=START + 2 * self.settings.max_seconds)
        except (ChildEnded, ChildTooSlow):
            self.child = None
            raise

    def measure(self, make_model: MakeModel, job: Job) -> dict[str, Any]:
        """As `zoo.eval.bench.cost.measure`; a process that ends is a result too."""
        try:
            return self.call(measure, make_model, job, self.settings.cost())
        except ChildTooSlow as error:
            return {"status": TOO_SLOW, "reason": str(error)}
        except ChildEnded as error:
            if error.killed:
                return {"status": OUT_OF_MEMORY, "reason": "the system killed the process, as it does without memory"}
            return {"status": FAILED, "reason": str(error)}


def _row(label: str, job: Job, result: dict[str, Any], limits: dict[str, float]) -> dict[str, Any]:
    """A row of the results; figures that there are not are None."""
    row = {"label": label, "arch": result.get("arch"), "kind": job.kind, "length": job.length, "batch": job.batch}
    seconds = result.get("seconds")
    row |= {"seconds": seconds, "tokens_per_second": None, "flops_share": None, "bytes_share": None}
    for key in ("peak_memory_bytes", "state_bytes", "flops", "flops_declared", "least_bytes", "backends"):
        row[key] = result.get(key)
    if seconds is not None:
        tokens = job.batch * (1 if job.kind == "decode" else job.length)
        row["tokens_per_second"] = tokens / seconds["median"]
        row["flops_share"] = row["flops"] / seconds["median"] / 1e9 / limits["matmul_gflops"]
        row["bytes_share"] = row["least_bytes"] / seconds["median"] / 1e9 / limits["copy_gbytes_per_second"]
    return row | {"status": result["status"], "reason": result["reason"]}


def _line(row: dict[str, Any]) -> str:
    where = "after" if row["kind"] == "decode" else "of"
    head = f"{row['label']}: {KINDS[row['kind']]} {where} {row['batch']} x {row['length']:,} tokens"
    if row["status"] != OK:
        return f"{head}: {row['status'].replace('_', ' ')} ({row['reason']})"
    return f"{head}: {1e3 * row['seconds']['median']:,.2f} ms, {row['peak_memory_bytes'] / 2**20:,.1f} MiB"


def _crossovers(
    makers: dict[str, MakeModel],
    rows: Sequence[dict[str, Any]],
    settings: BenchSettings,
    first: str | None,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Each change of order that is seen in the rows, narrowed down while there is time."""
    found: list[tuple[Bracket, int | None]] = []
    begun = time.perf_counter()
    for bracket in brackets(rows, first):
        length = None
        if time.perf_counter() - begun < settings.crossovers:
            try:
                with _Measurer(settings) as measurer:
                    length = _narrowed(bracket, makers, measurer, settings)
            except (ChildEnded, ChildTooSlow):
                pass  # the two together need more than each alone
            else:
                if length is None:
                    continue  # measured in turn, they are alike
        found.append((bracket, length))
    entries = crossovers(found)
    for entry in entries:
        say(entry["text"])
    return entries


def _narrowed(
    bracket: Bracket, makers: dict[str, MakeModel], measurer: _Measurer, settings: BenchSettings
) -> int | None:
    """The first length from which one is faster in every round, or needs less memory by more than its margin."""
    pair = [makers[bracket.faster], makers[bracket.slower]]

    def faster(length: int) -> bool:
        times = measurer.call(race, pair, settings.job(bracket.kind, length), settings.cost(), settings.repeats)
        return all(ours < theirs for ours, theirs in zip(*times, strict=True))

    def smaller(length: int) -> bool:
        ours, theirs = (measurer.measure(maker, settings.job(bracket.kind, length)) for maker in pair)
        return certainly_better(ours, theirs, "memory") == 0

    return first_length(bracket.low, bracket.high, faster if bracket.quantity == "time" else smaller, settings.grid)
