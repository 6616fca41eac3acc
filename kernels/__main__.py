"""`python -m zoo.kernels`: which backend of each operator runs on this machine, and why the others do not."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from zoo.kernels import describe


def devices() -> list[str]:
    """Returns the device types of this machine."""
    present = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()]
    return ["cpu", *present]


def main(arguments: Sequence[str] = ()) -> None:
    """Prints one table per device."""
    parser = argparse.ArgumentParser(prog="python -m zoo.kernels", usage="%(prog)s", description=__doc__)
    parser.parse_args(arguments)
    console = Console()
    for device in devices():
        table = Table("operator", "backend", "here", title=f"Operators on {device}", title_justify="left")
        for operator, choice, verdicts in describe(device):
            for backend, reason in verdicts:
                if backend == choice:
                    here = "[bold green]runs[/]: the first choice"
                elif reason is None:
                    here = f"can run, slower: backend={backend!r}"
                else:
                    here = f"[dim]no: {reason}[/]"
                table.add_row(operator, f"[bold green]{backend}[/]" if backend == choice else backend, here)
                operator = ""
            table.add_section()
        console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
