"""What one model costs at one length: time, memory, state, FLOPs. All of it runs in a process made for it (`Child`).

Letters: B batch, T length, V vocab_size.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.eval.measure import spread
from zoo.flops import count_flops
from zoo.kernels import backends, used
from zoo.kernels.errors import ZooError
from zoo.memory import PeakMemory, synchronize
from zoo.model import Model, ModelState, state_bytes
from zoo.settings import Settings, setting

MakeModel = Callable[[], Model]
"""Builds or loads a model; picklable, such as `functools.partial(zoo.create_model, "mamba", vocab_size=256)`."""

KINDS = {"train": "training step", "prefill": "prefill", "decode": "decoding step"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHORT, PIECE, STEPS = 16, 2048, 8
"""Tokens of the first call, which compiles; of a piece of what is read before decoding; decoding steps of one time."""
OK, OUT_OF_MEMORY, TOO_SLOW, FAILED = "ok", "out_of_memory", "too_slow", "failed"


@dataclass(kw_only=True)
class CostSettings(Settings):
    """How costs are measured."""

    device: str = setting("cpu", "cpu, cuda, cuda:1, ...")
    dtype: str = setting(
        "fp32", "fp32 or bf16; training in bf16 is autocast over weights in fp32", choices=tuple(DTYPES)
    )
    repeats: int = setting(5, f"times of each figure; each time of decoding is the median of {STEPS} steps", minimum=1)
    max_seconds: float = setting(10.0, "seconds for one figure; what needs more is too slow", above=0)


@dataclass(frozen=True)
class Job:
    """What is measured: calls of one kind, at one length."""

    kind: str
    """Of `KINDS`."""
    length: int
    """T: tokens of each sequence; of decoding, those that were read before."""
    batch: int
    """B."""


class TooSlow(Exception):
    """Measuring would take longer than it may."""

    def __init__(self, what: str, seconds: float, settings: CostSettings) -> None:
        super().__init__(
            f"{what} takes {seconds:.3g} seconds: too long to measure in max_seconds={settings.max_seconds:g}"
        )


class Subject:
    """A model that is ready for one kind of call, compiled and warm.

    A training step is forward, cross-entropy (with the auxiliary losses), backward and a fused update of AdamW. Prefill
    is one forward pass without gradients that begins with a fresh state and leaves one. A decoding step reads one token
    with the state that came before and leaves the next one.
    """

    def __init__(self, make_model: MakeModel, job: Job, settings: CostSettings) -> None:
        self.job, self.settings, self.device = job, settings, torch.device(settings.device)
        torch.manual_seed(0)
        self.model = make_model().to(self.device)
        self.state: ModelState | None = None
        training = job.kind == "train"
        self.model.train(training)
        dtype = DTYPES[settings.dtype]
        self.autocast = dtype if training and dtype != torch.float32 else None
        if not training:
            self.model.to(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True) if training else None
        self.tokens = self.draw(min(SHORT, job.length))
        if job.kind == "decode":
            self.read(self.tokens)
            self.tokens = self.draw(1)
        self.call()  # the optimiser now has its state, too
        self.state = None
        if job.kind != "decode":
            self.tokens = self.draw(job.length)

    def draw(self, length: int) -> Tensor:
        """Random tokens."""
        return torch.randint(self.model.config.vocab_size, (self.job.batch, length), device=self.device)  # (B, T)

    @torch.no_grad()
    def read(self, tokens: Tensor, limit: float = float("inf")) -> None:
        """Reads tokens, (B, T), before decoding.

        Raises:
            TooSlow: It takes longer than `limit` seconds.
        """
        begun = time.perf_counter()
        self.state = self.model.init_state(self.job.batch)
        for piece in tokens.split(PIECE, dim=1):
            self.state = self.model.read(piece, self.state)[1]
            taken = time.perf_counter() - begun
            if taken > limit:
                raise TooSlow(f"reading a part of {tokens.shape[1]:,} tokens before decoding", taken, self.settings)

    def call(self) -> None:
        """What is measured, once."""
        if self.optimizer is not None:
            self._train(self.optimizer)
            return
        with torch.no_grad():
            before = self.state if self.job.kind == "decode" else self.model.init_state(self.job.batch)
            self.state = self.model(self.tokens, state=before).state

    def _train(self, optimizer: torch.optim.Optimizer) -> None:
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            out = self.model(self.tokens)
            loss = F.cross_entropy(out.logits.flatten(0, 1), self.tokens.flatten()) + sum(out.losses.values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def time(self) -> float:
        """Seconds of one call; of decoding, the median of `STEPS` calls."""
        seconds = []
        for _ in range(STEPS if self.job.kind == "decode" else 1):
            synchronize(self.device)
            begun = time.perf_counter()
            self.call()
            synchronize(self.device)
            seconds.append(time.perf_counter() - begun)
        return statistics.median(seconds)

    def peak_memory(self) -> tuple[int, float]:
        """Most bytes that a call needs beyond weights and optimiser state, the model's state counted; and its seconds.

        So gradients count, and of decoding the memory of all tokens read.
        """
        held = 0 if self.state is None else state_bytes(self.state)
        if self.job.kind == "prefill":
            self.state, held = None, 0
        _give_back(self.device)
        memory = PeakMemory(self.device)
        memory.reset()
        before = memory.bytes()
        seconds = self.time()
        return max(0, memory.bytes() - before) + held, seconds


def measure(make_model: MakeModel, job: Job, settings: CostSettings) -> dict[str, Any]:
    """Measures one model at one length, in this process.

    Args:
        make_model: The model; it is built anew.
        job: What is measured.
        settings: How; measuring ends with fewer repeats (at least one) where `max_seconds` are over.

    Returns:
        `status`; where it is not "ok", `reason`; else `arch`, `seconds` (median, min, max, repeats; of one call),
        `peak_memory_bytes` (beyond weights and optimiser state), `state_bytes` (of one sequence, as held; None in
        training), `flops` (counted, of one call), `flops_declared` (by the architecture; None in training),
        `least_bytes` (that one call must move) and `backends`.
    """
    try:
        return {"status": OK, "reason": None} | _measure(make_model, job, settings)
    except Exception as error:
        status, reason = verdict(error)
        return {"status": status, "reason": reason}


def _measure(make_model: MakeModel, job: Job, settings: CostSettings) -> dict[str, Any]:
    subject = Subject(make_model, job, settings)
    begun = time.perf_counter()
    if job.kind == "decode":
        subject.read(subject.draw(job.length), settings.max_seconds)
        held = state_bytes(subject.state)
    backends.forget()
    flops = count_flops(subject.call, backward=job.kind == "train")  # the first call at this length: one to warm up
    taken = time.perf_counter() - begun
    if taken > settings.max_seconds:
        raise TooSlow(f"one {KINDS[job.kind]}", taken, settings)
    if job.kind == "prefill":
        held = state_bytes(subject.state)
    memory, estimate = subject.peak_memory()
    if time.perf_counter() - begun + estimate > settings.max_seconds:
        raise TooSlow(f"one {KINDS[job.kind]}", estimate, settings)
    seconds: list[float] = []
    while len(seconds) < settings.repeats and (not seconds or time.perf_counter() - begun < settings.max_seconds):
        seconds.append(subject.time())
    in_state = 0 if job.kind == "train" else held
    return {
        "arch": subject.model.architecture,
        "seconds": spread(seconds),
        "peak_memory_bytes": memory,
        "state_bytes": None if job.kind == "train" else in_state // job.batch,
        "flops": flops,
        "flops_declared": _declared(subject.model, job),
        "least_bytes": _least_bytes(subject.model, job, in_state),
        "backends": used(),
    }


def race(rivals: Sequence[MakeModel], job: Job, settings: CostSettings, rounds: int) -> list[list[float]]:
    """Times models in turn in one process, so that whatever else the machine does meets them all alike.

    Returns:
        For each model its seconds in each round; infinite where it cannot run, as when memory runs out.
    """
    subjects = [_ready(make_model, job, settings) for make_model in rivals]
    seconds: list[list[float]] = [[] for _ in rivals]
    for turn in range(rounds):
        for i in range(len(rivals))[:: -1 if turn % 2 else 1]:
            subject = subjects[i]
            seconds[i].append(float("inf") if subject is None else subject.time())
    return seconds


def _ready(make_model: MakeModel, job: Job, settings: CostSettings) -> Subject | None:
    try:
        subject = Subject(make_model, job, settings)
        if job.kind == "decode":
            subject.read(subject.draw(job.length), settings.max_seconds)
        subject.time()
        return subject
    except Exception as error:
        if verdict(error)[0] == FAILED:
            raise
        return None


def verdict(error: Exception) -> tuple[str, str]:
    """Status and reason that an error stands for."""
    text = " ".join(str(error).split())
    if isinstance(error, TooSlow):
        return TOO_SLOW, text
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return OUT_OF_MEMORY, text.rpartition("DefaultCPUAllocator: ")[2] or "memory ran out"
    return FAILED, text if isinstance(error, ZooError) else f"{type(error).__name__}: {text}"


def _declared(model: Model, job: Job) -> int | None:
    """FLOPs of one call by the architecture's formula, which tells of forward passes alone."""
    if job.kind == "train":
        return None
    read = model.flops(job.length)
    return job.batch * (read if job.kind == "prefill" else model.flops(job.length + 1) - read)


def _least_bytes(model: Model, job: Job, in_state: int) -> int:
    """Bytes that one call moves at the least: the weights and the state, once.

    A training step reads the weights forward and backward, writes and reads gradients, and reads and writes weights and
    two moments. Activations are left out: how often they must move is the kernels' business.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return 10 * weights if job.kind == "train" else weights + in_state


def _give_back(device: torch.device) -> None:
    """Hands freed memory back to the system, so that a new peak does not hide in it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
