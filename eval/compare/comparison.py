"""The folder of a comparison: one process at a time writes it, and only for the settings that it was begun with."""

from __future__ import annotations

import contextlib
import errno
import json
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from zoo.eval.compare import results
from zoo.eval.compare.plan import differences
from zoo.eval.compare.results import Row
from zoo.kernels.errors import ConfigError
from zoo.train.errors import RunError
from zoo.train.folder import replace_text

COMPARISON, BENCH, LOCK = "comparison.json", "bench.json", ".lock"


class Book:
    """Writes what is known so far.

    Attributes:
        folder: Of the comparison.
        told: What comparison.json says; times are added here.
    """

    def __init__(self, folder: Path, told: dict[str, Any], earlier: dict[str, Any]) -> None:
        self.folder = folder
        self.told = told
        self._hours = float(earlier.get("hours") or 0.0)
        self._begun = time.monotonic()
        told |= {"started": earlier.get("started") or _now(), "finished": None}

    def save(self, rows: Sequence[Row] | None = None, *, finished: bool = False) -> None:
        """Writes comparison.json, and results.csv if there are rows."""
        self.told["hours"] = self._hours + (time.monotonic() - self._begun) / 3600
        if finished:
            self.told["finished"] = _now()
        replace_text(self.folder / COMPARISON, json.dumps(self.told, indent=2) + "\n")
        if rows is not None:
            results.write(self.folder, rows, self.told["metric"]["name"])


@contextlib.contextmanager
def opened(folder: Path, told: dict[str, Any]) -> Iterator[Book]:
    """The folder, made or found again, for this process alone.

    Args:
        folder: Of the comparison.
        told: What comparison.json will say.

    Raises:
        ConfigError: Another process writes into it, it holds a comparison of other settings, or something else, or it
            cannot be made.
        RunError: The disk is full. What has finished stays.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK, timeout=0):
            book = Book(folder, told, _earlier(folder, told))
            book.save()
            yield book
    except Timeout:
        raise ConfigError(
            f"another comparison is writing into {folder}: wait for its end, or give this one another name=..."
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_is_full(folder) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise ConfigError(f"{folder} cannot be written ({error.strerror}): pass folder=...") from error
        raise


def disk_is_full(folder: Path) -> RunError:
    """The error, and its mend."""
    return RunError(
        f"the disk is full ({folder}): make room, then the same command goes on; cells that have finished are kept"
    )


def _earlier(folder: Path, told: dict[str, Any]) -> dict[str, Any]:
    """What comparison.json said so far; empty if the folder is new."""
    try:
        earlier = json.loads((folder / COMPARISON).read_text(encoding="utf-8"))
    except FileNotFoundError:
        strange = sorted(path.name for path in folder.iterdir() if path.name not in (LOCK, f"{COMPARISON}.part"))
        if strange:
            raise ConfigError(f"{folder} holds {strange[0]}, and no comparison: pass name=... or folder=...") from None
        return {}
    except ValueError:
        earlier = None
    if not isinstance(earlier, dict):
        raise ConfigError(f"{folder / COMPARISON} is damaged: restore it, or start anew with name=...")
    changes = differences(earlier, json.loads(json.dumps(told)))
    if changes:
        raise ConfigError(
            f"{folder} holds a comparison of other settings ({changes}): repeat its command, or start anew with "
            f"name=..."
        )
    return earlier


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
