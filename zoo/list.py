"""`python -m zoo.list [PATTERN]`: a table of the registered architectures, or of what can be loaded by name."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from zoo.console import run_cli
from zoo.kernels.errors import ConfigError
from zoo.model import create_model
from zoo.pretrained.variants import variants
from zoo.registry import architecture, list_models

USAGE = "usage: zoo list [--pretrained] [PATTERN]      for example: zoo list 'rwkv*'"
VOCABULARY, SHORT, LONG = 256, 1_024, 65_536
WIDE = 160


def main() -> None:
    """Prints name, what it is, size with default settings, and what one sequence costs to remember and to read."""
    pretrained = "--pretrained" in sys.argv[1:]
    arguments = [word for word in sys.argv[1:] if word != "--pretrained"]
    if "--help" in arguments or "-h" in arguments:
        print(f"{USAGE}\n\n--pretrained lists what can be loaded by name.")
        print(f"Sizes are those of the default settings at a vocabulary of {VOCABULARY}.")
        return
    if len(arguments) > 1 or any(word.startswith("-") for word in arguments):
        raise ConfigError(f"arguments {arguments} are not understood: {USAGE}")
    names = list_models(*arguments, pretrained=pretrained)
    if not names:
        if pretrained:
            raise ConfigError(f"no pretrained variant matches {arguments[0]!r}: without a pattern, all are shown")
        raise ConfigError(f"no architecture matches {arguments[0]!r}: known: {', '.join(list_models())}")
    if pretrained:
        _print_variants(names)
        return
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


def _print_variants(names: list[str]) -> None:
    """A row for each variant that `zoo.load_pretrained` knows by name."""
    table = Table(title="zoo.load_pretrained(name): bundled with the package, or public on the hub.", box=None)
    table.title_justify, table.padding, table.pad_edge = "left", (0, 2, 0, 0), False
    for heading, where in (("name", "left"), ("family", "left"), ("size", "right"), ("context", "right")):
        table.add_column(heading, justify=where, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("licence", no_wrap=True)
    table.add_column("from", overflow="fold")
    for row in (variants()[name] for name in names):
        size = f"{row.parameters / 1e9:.2f} B" if row.parameters >= 1e9 else f"{row.parameters / 1e6:.3g} M"
        table.add_row(row.name, row.family, size, f"{row.context:,}", row.licence, row.hub_id or "bundled")
    # A pipe or a file has no width that a row would have to fit.
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)


if __name__ == "__main__":
    sys.exit(run_cli(main))
