"""Rotary frequencies for sequences longer than those in training.

Each class turns the frequencies base^(-e), e = 2j/K for the pairs j of a head, into scaled ones, and may raise the
rotated queries and keys by a factor. Those that depend on the current length are functions of it alone: what was read
before, or will be read later, changes nothing.

Letters: K head width, s factor, L current length, L0 original length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.kernels.errors import ConfigError, did_you_mean
from zoo.settings import Settings, setting

LARGEST = 2**20
"""Of a factor: beyond it the base is no number of 64 bits in narrow heads."""

Scaled = tuple[Tensor, "Tensor | float"]
"""Frequencies (..., K/2), and the factor of cosine and sine, which broadcasts over them."""


@dataclass(kw_only=True)
class RopeScaling(Settings):
    """No scaling."""

    grows: ClassVar[bool] = False
    """Whether the frequencies depend on the current length."""

    def frequencies(self, base: float, exponents: Tensor, lengths: Tensor | None) -> Scaled:
        """The frequencies that a rotation uses.

        Args:
            base: Of the unscaled frequencies.
            exponents: e of each pair, (K/2,).
            lengths: Where `grows`: the current length L, (..., 1), which broadcasts with `exponents`.
        """
        return base**-exponents, 1.0

    def stage(self, lengths: Tensor) -> Tensor:
        """Numbers of the shape of `lengths`, equal where the frequencies are."""
        return torch.zeros_like(lengths)

    def check(self, width: int) -> None:
        """Raises ConfigError where the settings do not fit heads of `width` K."""


def _rebased(base: float | Tensor, exponents: Tensor, factor: float | Tensor) -> Tensor:
    """Another base, with which the slowest pair slows down by the factor and the fastest not at all."""
    width = 2 * exponents.shape[-1]
    # A single pair has frequency 1 whatever the base.
    return (base * factor ** (width / max(width - 2, 1))) ** -exponents


@dataclass(kw_only=True)
class Linear(RopeScaling):
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): all positions divided by the factor."""

    factor: float = setting(help="new length over original length", minimum=1, maximum=LARGEST)

    def frequencies(self, base: float, exponents: Tensor, lengths: Tensor | None) -> Scaled:
        """See `RopeScaling.frequencies`."""
        return base**-exponents / self.factor, 1.0


@dataclass(kw_only=True)
class NTK(RopeScaling):
    """NTK-aware (table 1 of Peng et al. 2023, arXiv 2309.00071): a larger base; fast pairs keep their frequencies."""

    factor: float = setting(help="how much slower the slowest pair turns", minimum=1, maximum=LARGEST)

    def frequencies(self, base: float, exponents: Tensor, lengths: Tensor | None) -> Scaled:
        """See `RopeScaling.frequencies`."""
        return _rebased(base, exponents, self.factor), 1.0


@dataclass(kw_only=True)
class _FromOriginal(RopeScaling):
    """One that begins at the length that the model was trained at."""

    original_length: int | None = setting(
        None, "length in training, where scaling begins; null: the config's trained_length", minimum=2
    )

    @property
    def start(self) -> int:
        """L0."""
        assert self.original_length is not None, "`make_scaling` fills it in"
        return self.original_length

    def stage(self, lengths: Tensor) -> Tensor:
        """See `RopeScaling.stage`."""
        return lengths.clamp(min=self.start) if self.grows else torch.zeros_like(lengths)


@dataclass(kw_only=True)
class DynamicNTK(_FromOriginal):
    """Dynamic NTK (section 3.3 of arXiv 2309.00071): NTK-aware with the factor that the current length needs."""

    grows: ClassVar[bool] = True

    factor: float = setting(1.0, "how fast the base grows beyond the original length", minimum=1, maximum=LARGEST)

    def frequencies(self, base: float, exponents: Tensor, lengths: Tensor | None) -> Scaled:
        """See `RopeScaling.frequencies`."""
        assert lengths is not None
        beyond = (lengths - self.start).clamp(min=0).to(exponents.dtype) / self.start
        return _rebased(base, exponents, 1 + self.factor * beyond), 1.0


@dataclass(kw_only=True)
class _Ramp(_FromOriginal):
    """What YaRN and dynamic YaRN share: slow pairs are interpolated, fast ones are not, others in part."""

    beta_fast: float = setting(32.0, "pairs that turn more often in the original length stay as they are", above=0)
    beta_slow: float = setting(1.0, "pairs that turn less often are interpolated", above=0)
    form: str = setting(
        "index",
        "the ramp between is linear in the index of the pair (the published code) or in its rotations (the paper)",
        choices=("index", "rotations"),
    )
    truncate: bool = setting(True, "the ramp by index begins and ends at whole indices")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta_fast <= self.beta_slow:
            self.fail("beta_fast", f"expected more than beta_slow={self.beta_slow:g}")

    def interpolated(self, base: float, exponents: Tensor) -> Tensor:
        """How far each pair is interpolated, 0 to 1, (K/2,)."""
        if self.form == "rotations":
            rotations = self.start * base**-exponents / (2 * math.pi)
            return 1 - ((rotations - self.beta_slow) / (self.beta_fast - self.beta_slow)).clamp(0, 1)
        width = 2 * exponents.shape[-1]

        def index(rotations: float) -> float:
            return width * math.log(self.start / (2 * math.pi * rotations)) / (2 * math.log(base))

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        if low == high:
            high += 0.001
        pairs = torch.arange(width // 2, device=exponents.device, dtype=exponents.dtype)
        return ((pairs - low) / (high - low)).clamp(0, 1)

    def ramped(self, base: float, exponents: Tensor, factor: float | Tensor) -> Tensor:
        """Frequencies, the interpolated ones divided by the factor."""
        frequencies, share = base**-exponents, self.interpolated(base, exponents)
        return frequencies / factor * share + frequencies * (1 - share)


@dataclass(kw_only=True)
class Yarn(_Ramp):
    """YaRN (Peng et al. 2023, arXiv 2309.00071): interpolates slow pairs alone, and sharpens the attention."""

    factor: float = setting(help="new length over original length", minimum=1, maximum=LARGEST)
    attention_factor: float | None = setting(None, "factor of queries and of keys; null: 1 + 0.1 ln factor", above=0)
    mscale: float | None = setting(
        None, "with mscale_all_dim: (1 + 0.1 mscale ln factor) over the same with mscale_all_dim", minimum=0
    )
    mscale_all_dim: float | None = setting(None, "see mscale, which has no effect alone", minimum=0)

    def frequencies(self, base: float, exponents: Tensor, lengths: Tensor | None) -> Scaled:
        """See `RopeScaling.frequencies`."""
        sharper = self.attention_factor
        if sharper is None:
            log = math.log(self.factor)
            sharper = 1 + 0.1 * log
            if self.mscale and self.mscale_all_dim:
                sharper = (1 + 0.1 * self.mscale * log) / (1 + 0.1 * self.mscale_all_dim * log)
        return self.ramped(base, exponents, self.factor), sharper


@dataclass(kw_only=True)
class DynamicYarn(_Ramp):
    """Dynamic YaRN (section 3.3 of arXiv 2309.00071): YaRN with the factor that the current length needs."""

    grows: ClassVar[bool] = True

    def frequencies(self, base: float, exponents: Tensor, lengths: Tensor | None) -> Scaled:
        """See `RopeScaling.frequencies`."""
        assert lengths is not None
        factor = lengths.clamp(min=self.start).to(exponents.dtype) / self.start
        return self.ramped(base, exponents, factor), 1 + 0.1 * factor.log()


@dataclass(kw_only=True)
class Llama3(_FromOriginal):
    """Llama 3.1 (Dubey et al. 2024, arXiv 2407.21783): slow pairs divided by the factor, fast ones as they are."""

    factor: float = setting(8.0, "divides the frequencies of slow pairs", minimum=1, maximum=LARGEST)
    low_freq_factor: float = setting(1.0, "rotations in the original length up to which a pair is slow", above=0)
    high_freq_factor: float = setting(4.0, "rotations from which on it is fast", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high_freq_factor <= self.low_freq_factor:
            self.fail("high_freq_factor", f"expected more than low_freq_factor={self.low_freq_factor:g}")

    def frequencies(self, base: float, exponents: Tensor, lengths: Tensor | None) -> Scaled:
        """See `RopeScaling.frequencies`."""
        frequencies = base**-exponents
        rotations = self.start * frequencies / (2 * math.pi)
        fast = ((rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - fast) * frequencies / self.factor + fast * frequencies, 1.0


@dataclass(kw_only=True)
class LongRoPE(_FromOriginal):
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): each pair by a factor of its own that a search found."""

    grows: ClassVar[bool] = True

    factor: float = setting(
        help="new length over original length, for the attention factor", minimum=1, maximum=LARGEST
    )
    short_factor: list[float] = setting(help="divides the frequency of each pair, up to the original length")
    long_factor: list[float] = setting(help="divides the frequency of each pair, beyond the original length")
    attention_factor: float | None = setting(
        None, "factor of queries and of keys; null: sqrt(1 + ln factor / ln original_length)", above=0
    )

    def stage(self, lengths: Tensor) -> Tensor:
        """See `RopeScaling.stage`."""
        return lengths > self.start

    def check(self, width: int) -> None:
        """See `RopeScaling.check`."""
        for name in ("short_factor", "long_factor"):
            values = getattr(self, name)
            if len(values) != width // 2 or not all(0 < value < math.inf for value in values):
                self.fail(name, f"expected {width // 2} numbers above 0, one per pair of a head of width {width}")

    def frequencies(self, base: float, exponents: Tensor, lengths: Tensor | None) -> Scaled:
        """See `RopeScaling.frequencies`."""
        assert lengths is not None
        sharper = self.attention_factor
        if sharper is None:
            sharper = math.sqrt(1 + math.log(self.factor) / math.log(self.start))
        short, long = (exponents.new_tensor(values) for values in (self.short_factor, self.long_factor))
        return base**-exponents / torch.where(lengths > self.start, long, short), sharper


SCALINGS: dict[str, type[RopeScaling]] = {
    "none": RopeScaling,
    "linear": Linear,
    "ntk": NTK,
    "dynamic": DynamicNTK,
    "yarn": Yarn,
    "dynamic_yarn": DynamicYarn,
    "llama3": Llama3,
    "longrope": LongRoPE,
}
"""The scalings by name."""


def make_scaling(values: Mapping[str, Any], trained_length: int | None, width: int) -> RopeScaling:
    """The scaling that a config describes.

    Args:
        values: Its name as `type`, and its settings; empty: none.
        trained_length: The `original_length` of those that need one and are not told.
        width: K.

    Raises:
        ConfigError: Unknown name or setting, or a bad or missing value.
    """
    settings = dict(values)
    name = settings.pop("type", "none" if not settings else None)
    if name not in SCALINGS:
        raise ConfigError(f"rope_scaling has type {name!r}: {did_you_mean(str(name), SCALINGS)}")
    try:
        scaling = SCALINGS[name].from_dict(settings, owner=f"rope_scaling {name!r}")
        if isinstance(scaling, _FromOriginal) and scaling.original_length is None:
            if trained_length is None:
                raise ConfigError(
                    f"rope_scaling {name!r} needs original_length, the length that the model was trained at: pass "
                    f"original_length=..., or set the model's trained_length"
                )
            scaling = replace(scaling, original_length=trained_length)
        scaling.check(width)
    except ConfigError as error:
        own = str(error).partition("=")[0] in settings
        raise ConfigError(f"rope_scaling.{error}" if own else str(error)) from None
    return scaling
