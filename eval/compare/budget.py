"""Sizes an architecture to a budget: parameters, FLOPs per token, or bytes of state.

Models are counted on the meta device, where they hold no memory and cost a few milliseconds each.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.errors import ConfigError
from zoo.model import Model, create_model
from zoo.registry import architecture

TOLERANCE = 0.01
"""Largest relative difference from the budget that counts as a match."""

UNITS = {"params": "parameters", "flops": "forward FLOPs per token", "state": "bytes of state"}
WIDTH_STEP = 8
HEADED_STEP = 32
"""Widths are multiples of these; the second where heads have a width of their own, which odd widths would make tiny."""
FINER = (4, 2, 1)
HEADS = ("n_heads", "head_dim")
INNER, MEMORY = "d_ff", "d_state"
KNOB_STEPS = (16, 8, 4, 2, 1)
HEAD_WIDTH = 64
"""What architectures take where `head_dim` is left open, if the width allows it."""
NEAREST = 16
"""Values of such a setting that are tried together with all widths, where the budget is as near as this:"""
NEAR = 0.25
LARGEST = 2**16
DEEPEST = 3
"""Depths up to so many times the architecture's own are tried, where no width will do."""


@dataclass(frozen=True)
class Size:
    """What one model costs."""

    params: int
    embedding: int
    """Of these, the parameters of the embedding, and of the head where it has its own."""
    flops_per_token: int
    """Forward, at the length asked for."""
    state_bytes: int
    """Of one sequence in fp32 after so many tokens."""


@dataclass(frozen=True)
class Fit:
    """Settings that meet a budget."""

    changes: dict[str, Any]
    """Settings beside those given."""
    target: float
    reached: float

    @property
    def mismatch(self) -> float:
        """What is left, relative to the budget: 0.004 is 0.4 % too much."""
        return self.reached / self.target - 1

    @property
    def matches(self) -> bool:
        """Whether that is within the tolerance."""
        return abs(self.mismatch) <= TOLERANCE


def measure(name: str, settings: Mapping[str, Any], length: int) -> Size:
    """Counts a model.

    Args:
        name: A registered architecture.
        settings: Fields of its config, `vocab_size` at least.
        length: Tokens of a sequence, for FLOPs and state.

    Raises:
        ConfigError: The settings do not fit together.
    """
    return _measure(name, json.dumps(settings, sort_keys=True), length)


@functools.lru_cache(maxsize=4096)
def _measure(name: str, settings: str, length: int) -> Size:
    with torch.device("meta"):
        model = create_model(name, **json.loads(settings))
    ends = [model.embedding, *([] if model.head is None else [model.head])]
    return Size(
        params=sum(p.numel() for p in model.parameters()),
        embedding=sum(p.numel() for end in ends for p in end.parameters()),
        flops_per_token=model.flops(length) // length,
        state_bytes=state_bytes(model, length),
    )


def state_bytes(model: Model, length: int) -> int:
    """Declared bytes of the state of one sequence in fp32 after `length` tokens; 0 where there is none."""
    if not model.config.causal:
        return 0
    # Counters are wider than fp32, and there are as many of them after any number of tokens.
    wider = sum(t.numel() * (t.element_size() - 4) for t in _tensors(model.init_state(1, dtype=torch.float32)))
    return 4 * model.state_size(length) + wider


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    else:
        for item in state:
            yield from _tensors(item)


def quantity(size: Size, by: str) -> int:
    """What a budget by "params", "flops" or "state" is about."""
    return {"params": size.params, "flops": size.flops_per_token, "state": size.state_bytes}[by]


def fit(name: str, given: Mapping[str, Any], by: str, target: float, length: int) -> Fit:
    """Finds settings with which an architecture meets a budget within `TOLERANCE`.

    The settings as given come first; then the width, then the width of the feed-forward, and only where these do not
    do, finer widths, the size of the state, the heads and the depth. What is given stays as it is.

    Args:
        name: A registered architecture.
        given: The settings that are decided, `vocab_size` at least.
        by: "params", "flops" or "state".
        target: The budget.
        length: Tokens of a sequence, for FLOPs and state.

    Raises:
        ConfigError: There are no such settings; the message tells the nearest that were found.
    """
    search = _Search(name, dict(given), by, target, length)
    if by == "state" and not search.config.causal:
        raise ConfigError(f"{name} has causal=false and so no state to match: compare with match=params or match=flops")
    for _ in search.stages():
        if search.best is not None and search.best.matches:
            return search.best
    nearest = ""
    if search.best is not None:
        told = ", ".join(f"{key}={value}" for key, value in search.best.changes.items()) or "its settings as they are"
        nearest = f" (nearest: {search.best.reached:,.0f}, with {told})"
    raise ConfigError(
        f"a budget of {target:,.0f} {UNITS[by]} cannot be reached by {name} within {TOLERANCE:.0%}{nearest}: pass "
        f"another budget=..., leave out settings of arch.{name}, or compare with match=none"
    )


class _Search:
    """The state of one search: what was given, and the best so far."""

    def __init__(self, name: str, given: dict[str, Any], by: str, target: float, length: int) -> None:
        self.name, self.given, self.by, self.target, self.length = name, given, by, target, length
        self.best: Fit | None = None
        self.config = architecture(name).config.from_dict(given, owner=f"architecture {name!r}")
        self.knobs = list(_knobs(name, self.config, given))
        self.headed = any(path[-1] in HEADS for path in self.knobs)
        own_width = any(path[-1] == "head_dim" for path in self.knobs)
        self.step = HEADED_STEP if own_width else WIDTH_STEP

    def stages(self) -> Iterator[None]:
        """Tries more and more, and stops for a look at `best` now and then."""
        yield from self._at_depth({})
        if "n_layers" not in self.given:
            own, period = self.config.n_layers, len(getattr(self.config, "pattern", [0]))
            depths = range(period, DEEPEST * own + 1, period)
            for depth in sorted(depths, key=lambda depth: (abs(depth - own), depth)):
                if depth != own:
                    yield from self._at_depth({"n_layers": depth})

    def _at_depth(self, base: dict[str, Any]) -> Iterator[None]:
        self.quantity(base)
        yield
        nearest = self._widths(base, self.step)
        yield
        yield from self._tune(nearest, INNER)
        if not self.headed:
            for step in FINER:
                nearest = self._widths(base, step)
                yield
        yield from self._tune(nearest, MEMORY)
        near = self.best is not None and abs(self.best.mismatch) < NEAR
        for path in self.knobs:  # together with the width, from the setting's own value outwards
            if near and path[-1] in (*HEADS, MEMORY):
                for value in self._around(path):
                    self._widths(self._with(base, path, value), 1 if path[-1] in HEADS else self.step)
                    yield

    def _around(self, path: tuple[str, ...]) -> list[int]:
        """Values near the setting's own."""
        config: Any = self.config
        config = config if len(path) == 1 else config.member(path[1])
        own, step = getattr(config, path[-1]) or HEAD_WIDTH, 4 if path[-1] == "head_dim" else 1
        values = range(step, 2 * own + 1, step)
        return sorted(values, key=lambda value: (abs(value - own), value))[:NEAREST]

    def _tune(self, base: dict[str, Any], knob: str) -> Iterator[None]:
        """One integer setting, by coarse steps first: round sizes run faster."""
        for path in self.knobs:
            if path[-1] == knob:
                for step in KNOB_STEPS:
                    self._nearest(base, path, step)
                    yield

    def _widths(self, base: dict[str, Any], step: int) -> dict[str, Any]:
        """The width on a grid that comes nearest, as changes."""
        if "d_model" in self.given:
            return base
        valid = (i * step for i in range(1, 1 + max(64, 128 // step)))
        first = next((width for width in valid if self.quantity({**base, "d_model": width}) is not None), None)
        return base if first is None else self._nearest(base, ("d_model",), first)

    def _nearest(self, base: dict[str, Any], path: tuple[str, ...], step: int) -> dict[str, Any]:
        """`base` with the multiple of `step` that brings it nearest to the budget, which grows with the setting."""

        def changed(i: int) -> dict[str, Any]:
            return self._with(base, path, i * step)

        def reaches(i: int) -> bool:
            quantity = self.quantity(changed(i))
            return quantity is not None and quantity >= self.target

        high = 1
        while high * step < LARGEST and not reaches(high):
            high *= 2
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reaches(middle) else (middle, high)
        # Heads that change with the width make small steps back; hence a few neighbours.
        found = [(self.quantity(changed(i)), i) for i in range(max(1, low - 2), high + 3)]
        near = [(abs(quantity - self.target), i) for quantity, i in found if quantity is not None]
        return changed(min(near)[1]) if near else base

    def quantity(self, changes: dict[str, Any]) -> float | None:
        """What the budget is about, with these changes; None where the architecture refuses them."""
        try:
            size = measure(self.name, {**self.given, **changes}, self.length)
        except ConfigError:
            return None
        candidate = Fit(changes, self.target, quantity(size, self.by))
        if self.best is None or abs(candidate.mismatch) < abs(self.best.mismatch):
            self.best = candidate
        return candidate.reached

    def _with(self, base: dict[str, Any], path: tuple[str, ...], value: int) -> dict[str, Any]:
        if len(path) == 1:
            return {**base, path[0]: value}
        group, member, name = path
        members = base.get(group, self.given.get(group, {}))
        return {**base, group: {**members, member: {**members.get(member, {}), name: value}}}


def _knobs(name: str, config: Any, given: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Paths of the integer settings that size an architecture beside width and depth, where they are left open."""
    known = {field.name for field in dataclasses.fields(config)}
    yield from ((knob,) for knob in (*HEADS, INNER, MEMORY) if knob in known - given.keys())
    if name == "hybrid":  # its members have their own
        for member in dict.fromkeys(config.pattern):
            told = given.get("members", {}).get(member, {})
            for path in _knobs(member, config.member(member), told):
                yield ("members", member, *path)
