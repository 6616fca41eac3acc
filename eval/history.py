"""What a model was trained on, as far as its folder tells."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.pretrained.sources import locate

RECORDS = ("training.json", "../summary.json", "summary.json")
"""Where the record of its training lies, seen from a model's folder: bundled, in a run, or copied beside it."""


@dataclass(frozen=True)
class History:
    """How a model came to be."""

    data: str
    settings: dict[str, Any]
    """Those of the dataset."""
    objective: str
    mask_rate: float | None
    record: dict[str, Any]
    """All that was written down."""


def history(name: str) -> History | None:
    """The record of a model that the zoo trained; None where there is none.

    Raises:
        CheckpointError: There is no such model.
    """
    place = locate(name)
    for record in (place / relative for relative in RECORDS if place.is_dir()):
        found = _read(record)
        if found is not None:
            return found
    return None


def _read(path: Path) -> History | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        config = record["config"]
        data = dict(config["data"])
        return History(data.pop("name"), data, config["objective"], config["mask_rate"], record)
    except (OSError, ValueError, LookupError, TypeError):
        return None
