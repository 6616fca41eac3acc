"""Numbers and lists as people write them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from zoo.eval.report.spread import Spread

Form = Callable[[float], str]
NONE = "–"
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_DECIMAL = ("", "k", "M", "G", "T", "P")
_SECONDS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def count(value: float) -> str:
    """A whole number: "12,345"."""
    return f"{value:,.0f}"


def digits(value: float) -> str:
    """Three digits that count, without an exponent: "1,230", "0.0123"."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{min(max(0, places), 9)}f}"


def short(value: float) -> str:
    """Three digits and a letter: "1.2M"."""
    power = _power(value, 1000, len(_DECIMAL))
    return f"{_three(value / 1000**power)}{_DECIMAL[power]}"


def length(value: float) -> str:
    """Tokens on an axis: "512", "64k" for 65,536."""
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else count(value)


def size(value: float) -> str:
    """Bytes: "1.5 MiB"."""
    power = _power(value, 1024, len(_BINARY))
    return f"{_three(value / 1024**power)} {_BINARY[power]}"


def duration(value: float) -> str:
    """Seconds: "1.5 ms"."""
    unit, name = next(((unit, name) for unit, name in _SECONDS if value >= unit), _SECONDS[-1])
    return f"{_three(value / unit)} {name}"


def rate(value: float) -> str:
    """A learning rate: "3e-3"."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def percent(value: float) -> str:
    """A share: "0.4 %"."""
    return f"{100 * value:.2g} %" if abs(value) < 0.1 else f"{100 * value:.0f} %"


def level(value: float) -> str:
    """An accuracy or a loss: "0.998"."""
    return f"{value:.3f}" if abs(value) < 100 else digits(value)


def span(value: Spread, form: Form) -> str:
    """The range: "0.995 to 0.999"; nothing where there is one value or both ends look alike."""
    low, high = form(value.low), form(value.high)
    return "" if value.count == 1 or low == high else f"{low} to {high}"


def spread(value: Spread, form: Form) -> str:
    """Median and range: "0.998 (0.995 to 0.999)"."""
    range_ = span(value, form)
    return f"{form(value.median)} ({range_})" if range_ else form(value.median)


def listing(items: Sequence[str], last: str = "and") -> str:
    """Several things in a sentence: "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}" if items else ""


def many(number: int, what: str) -> str:
    """A number of things: "1 seed", "3 seeds"."""
    plural = "es" if what.endswith("ch") else "s"
    return f"{number:,} {what}{'' if number == 1 else plural}"


def _power(value: float, base: int, powers: int) -> int:
    return 0 if abs(value) < base else min(powers - 1, int(math.log(abs(value), base) + 1e-9))


def _three(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
