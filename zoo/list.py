"""`python -m zoo.list [PATTERN]`: a table of the registered architectures."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from zoo.console import run_cli
from zoo.kernels.errors import ConfigError
from zoo.model import create_model
from zoo.registry import architecture, list_models

USAGE = "usage: zoo list [PATTERN]      for example: zoo list 'rwkv*'"
VOCABULARY, SHORT, LONG = 256, 1_024, 65_536


def main() -> None:
    """Prints name, what it is, size with default settings, and what one sequence costs to remember and to read."""
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print(f"{USAGE}\n\nSizes are those of the default settings at a vocabulary of {VOCABULARY}.")
        return
    if len(arguments) > 1 or any(word.startswith("-") for word in arguments):
        raise ConfigError(f"arguments {arguments} are not understood: {USAGE}")
    names = list_models(*arguments)
    if not names:
        raise ConfigError(f"no architecture matches {arguments[0]!r}: known: {', '.join(list_models())}")
    table = Table(
        title=f"Default sizes, vocabulary {VOCABULARY}. State: elements kept per sequence after so many tokens; FLOPs: "
        f"forward, over {SHORT:,} tokens.",
        title_justify="left",
    )
    table.add_column("architecture", no_wrap=True)
    for heading in ("parameters", f"state, {SHORT:,}", f"state, {LONG:,}", "FLOPs/token"):
        table.add_column(heading, justify="right")
    summaries = Table.grid(padding=(0, 2))
    for name in names:
        summaries.add_row(f"[bold]{name}[/]", architecture(name).summary)
        model = create_model(name, vocab_size=VOCABULARY)
        table.add_row(
            name,
            f"{sum(p.numel() for p in model.parameters()):,}",
            f"{model.state_size(SHORT):,}",
            f"{model.state_size(LONG):,}",
            f"{model.flops(SHORT) // SHORT:,}",
        )
    # Beside the figures they would leave no room for either on a narrow terminal.
    console = Console()
    console.print(summaries)
    console.print()
    console.print(table)


if __name__ == "__main__":
    sys.exit(run_cli(main))
