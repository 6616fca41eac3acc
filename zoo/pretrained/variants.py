"""The table of public variants that are known to load, from `variants.json`."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Variant:
    """A published model."""

    name: str
    family: str
    """The zoo's architecture."""
    parameters: int
    """Tied ones once."""
    context: int
    """Tokens of a sequence in training."""
    licence: str
    hub_id: str
    """On the hub; with a third part, a file in that repository."""


@functools.cache
def variants() -> dict[str, Variant]:
    """All variants by name, in the order of the table."""
    rows = json.loads((Path(__file__).parent / "variants.json").read_text(encoding="utf-8"))
    return {row["name"]: Variant(**row) for row in rows}
