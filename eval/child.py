"""A process for measuring in: its memory is its own, and where it runs out of it or of time, only it ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from zoo.kernels.errors import ZooError

KILOBYTE = 1024


class ChildEnded(ZooError):
    """The process ended before it answered."""

    def __init__(self, exitcode: int | None) -> None:
        super().__init__(f"the measuring process ended with exit code {exitcode}: its message stands above")
        self.killed = exitcode is not None and exitcode < 0
        """By a signal, as the system does where memory runs out."""


class ChildTooSlow(ZooError):
    """The process was ended because it did not answer in time."""


class Child:
    """A fresh process that makes calls, one at a time, until it is closed.

    Args:
        memory: Bytes that it may hold beyond what it holds at the start, where the system can limit that (Linux); more
            is a `MemoryError` or torch's own. None: no limit.
    """

    def __init__(self, memory: int | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, torch.get_num_threads(), memory), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, function: Callable[..., Any], *args: Any, timeout: float | None = None) -> Any:
        """Returns `function(*args)`, computed over there; all three must be importable and picklable.

        Raises:
            ChildEnded: The call ended the process: it raised (the traceback is on stderr), or the system killed it.
            ChildTooSlow: There was no answer within `timeout` seconds; the process is ended.
        """
        try:
            self._connection.send((function, args))
            if not self._connection.poll(timeout):
                self.close()
                raise ChildTooSlow(f"no answer within {timeout:g} seconds")
            return self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise ChildEnded(self._process.exitcode) from None

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(connection: Connection, threads: int, memory: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    torch.set_num_threads(threads)
    if memory is not None:
        _limit_memory(memory)
    with contextlib.suppress(EOFError):
        while True:
            function, args = connection.recv()
            connection.send(function(*args))


def _limit_memory(more: int) -> None:
    """Lets this process hold so many bytes more; where the system cannot do that, nothing changes."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmData:"):
                held = int(line.split()[1]) * KILOBYTE
                resource.setrlimit(resource.RLIMIT_DATA, (held + more, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def available_memory() -> int | None:
    """Bytes that a new process can take without swapping; None where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * KILOBYTE
    return None
