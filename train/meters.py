"""What training costs: the time spent on it, and its largest memory."""

from __future__ import annotations

import time

import torch

from zoo.memory import PeakMemory, synchronize


class TrainingMeter:
    """Tokens, seconds and peak memory of the stretches between `start` and `stop`, added up.

    A stretch is training alone: the caller stops the meter for validation and for writing checkpoints, and starts it
    only after the first steps, in which kernels are compiled and memory pools grow.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory = PeakMemory(device)
        self.seconds = 0.0
        self.tokens = 0
        self.peak_bytes = 0
        self._since: float | None = None
        self._open_tokens = 0

    @property
    def running(self) -> bool:
        """Whether a stretch is open."""
        return self._since is not None

    @property
    def tokens_per_second(self) -> float | None:
        """Mean over the closed stretches; None before there is one."""
        return self.tokens / self.seconds if self.seconds else None

    def start(self) -> None:
        """Opens a stretch."""
        synchronize(self.device)
        self.memory.reset()
        self._open_tokens = 0
        self._since = time.perf_counter()

    def add(self, tokens: int) -> None:
        """Counts the tokens of a step; they matter if a stretch is open."""
        self._open_tokens += tokens

    def stop(self) -> None:
        """Closes the stretch, if one is open."""
        if self._since is None:
            return
        synchronize(self.device)
        self.seconds += time.perf_counter() - self._since
        self.tokens += self._open_tokens
        self.peak_bytes = max(self.peak_bytes, self.memory.bytes())
        self._since = None

    def state_dict(self) -> dict[str, float]:
        """What a resumed run goes on from: the closed stretches."""
        return {"seconds": self.seconds, "tokens": self.tokens, "peak_bytes": self.peak_bytes}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from `state_dict` of an earlier process."""
        self.seconds = float(state["seconds"])
        self.tokens, self.peak_bytes = int(state["tokens"]), int(state["peak_bytes"])
