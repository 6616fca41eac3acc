"""The one place where an error meets the person at the command line: one line and an exit status, no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from zoo.kernels.errors import ZooError

DEBUG_VARIABLE = "ZOO_DEBUG"
USER_ERROR = 2
RUN_ERROR = 1
INTERRUPTED = 130


def run_cli(main: Callable[[], int | None], translate: Callable[[Exception], ZooError | None] | None = None) -> int:
    """Runs a command and turns what it raises into one line on stderr.

    Args:
        main: The command; returns its exit status, None for 0.
        translate: Gives the `ZooError` that another library's exception stands for, or None if it stands for none.

    Returns:
        The exit status: that of `main`; of a `ZooError` its `exit_status` if it has one, else 2 (the user can mend
        it); 130 after Ctrl-C; 1 for what nobody foresaw. With the environment variable ZOO_DEBUG=1 errors pass
        through with their traceback.
    """
    try:
        return main() or 0
    except KeyboardInterrupt as interrupt:
        _say(str(interrupt) or "interrupted")
        return INTERRUPTED
    except Exception as error:
        return report(error, translate)


def report(
    error: Exception, translate: Callable[[Exception], ZooError | None] | None = None, *, head: str = "error"
) -> int:
    """Prints the one line about an error, `head` before it, and returns its exit status; the rest as in `run_cli`."""
    if os.environ.get(DEBUG_VARIABLE) == "1":
        raise error
    known = error if isinstance(error, ZooError) else translate(error) if translate else None
    if known is None:
        _say(f"{head}: {type(error).__name__}: {error} (not foreseen: {DEBUG_VARIABLE}=1 shows the traceback)")
        return RUN_ERROR
    _say(f"{head}: {known}")
    return getattr(known, "exit_status", USER_ERROR)


def _say(message: str) -> None:
    print(" ".join(message.split()), file=sys.stderr, flush=True)
