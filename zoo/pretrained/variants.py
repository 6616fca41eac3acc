"""What can be loaded by name: the variants that come with the package, and public ones on the hub.

The package's own are found by looking into their folder; each has the record of its training beside its weights. The
public ones stand in `variants.json`.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

BUNDLED = Path(__file__).parent / "bundled"
"""One folder per variant that comes with the package."""
RECORD = "training.json"


@dataclass(frozen=True)
class Variant:
    """A trained model with a name."""

    name: str
    family: str
    """The zoo's architecture."""
    parameters: int
    """Tied ones once."""
    context: int
    """Tokens of a sequence in training."""
    licence: str
    hub_id: str | None
    """On the hub; with a third part, a file in that repository. None: it comes with the package."""


@functools.cache
def variants() -> dict[str, Variant]:
    """All variants by name: first those in the package, then the public ones in the order of the table."""
    rows = json.loads((Path(__file__).parent / "variants.json").read_text(encoding="utf-8"))
    return {
        row.name: row for row in (*map(_bundled, sorted(BUNDLED.glob(f"*/{RECORD}"))), *(Variant(**r) for r in rows))
    }


def _bundled(record: Path) -> Variant:
    told = json.loads(record.read_text(encoding="utf-8"))
    return Variant(record.parent.name, told["arch"], told["params"], told["context"], told["licence"], None)
