"""`python -m zoo.bench`: measures architectures against length, or (`kernels`) the operators they are made of."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import zoo
from zoo.checkpoint import model_settings
from zoo.command import usable_device
from zoo.console import run_cli
from zoo.eval.bench import BenchSettings, bench
from zoo.eval.bench.cost import OK, MakeModel
from zoo.eval.measure import WIDTH, in_words
from zoo.kernels import backends
from zoo.kernels.errors import ConfigError, ZooError, did_you_mean
from zoo.registry import architecture, list_models
from zoo.settings import describe_settings, parse_overrides, parse_value, setting

OWNER = "zoo bench"
TITLES = {
    "train": "Training step: forward, backward and a fused update of AdamW",
    "prefill": "Prefill: one forward pass that leaves a state",
    "decode": "Decoding step after T tokens",
}


@dataclass(kw_only=True)
class BenchConfig(BenchSettings):
    """What is measured, and where the results go."""

    arch: list[str] | None = setting(None, "architectures, as in mamba,transformer; null: all, or none beside models=")
    models: list[str] | None = setting(None, "or trained models: folders, names of `zoo list --pretrained`, hub ids")
    vocab_size: int = setting(256, "of the architectures", minimum=1)
    d_model: int | None = setting(None, "width of all architectures; null: their own defaults", minimum=1)
    n_layers: int | None = setting(None, "blocks of all architectures; null: their own defaults", minimum=1)
    out: str | None = setting(None, "file for the results, bench.json")
    plot: str | None = setting(None, "file for a picture of time and memory against length, bench.png")

    def __post_init__(self) -> None:
        super().__post_init__()
        usable_device(self.device)
        for name in ("out", "plot"):
            path = getattr(self, name)
            if path is not None and not Path(path).absolute().parent.is_dir():
                self.fail(name, "there is no such folder: make it first")
        missing = backends.missing("matplotlib", "'subquadratic-zoo[plots]'")
        if self.plot is not None and missing:
            raise ZooError(f"no picture can be drawn: {missing}; or leave plot= out")


def main() -> None:
    """Prints what each model costs, and the crossovers."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["kernels"]:
        from zoo.eval.bench.kernels import main as bench_kernels

        bench_kernels(arguments[1:])
        return
    if "--help" in arguments or "-h" in arguments:
        _print_help()
        return
    own = [word for word in arguments if "." in word.partition("=")[0]]
    config = parse_overrides(BenchConfig, [word for word in arguments if word not in own], OWNER)
    models = contestants(config, own)
    console, progress = Console(), Console(stderr=True)
    console.width = max(console.width, WIDTH)
    progress.print(f"measuring {', '.join(label for label, _ in models)}: {', '.join(config.kinds)}", soft_wrap=True)
    found = bench(models, config, say=lambda line: progress.print(line, soft_wrap=True, highlight=False))
    for kind in config.kinds:
        console.print(table(kind, found["rows"]))
    for crossover in found["crossovers"]:
        console.print(crossover["text"], soft_wrap=True, highlight=False)
    if config.out is not None:
        Path(config.out).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        console.print(f"wrote {config.out}", soft_wrap=True, highlight=False)
    if config.plot is not None:
        from zoo.eval.bench.figure import draw

        draw(found["rows"], found["crossovers"], Path(config.plot))
        console.print(f"wrote {config.plot}", soft_wrap=True, highlight=False)


def contestants(config: BenchConfig, words: Sequence[str] = ()) -> list[tuple[str, MakeModel]]:
    """Label and maker of each model that the settings name.

    Args:
        config: The settings.
        words: Settings of single architectures: `transformer.window=256`.

    Raises:
        ConfigError: An architecture or a setting is not known, or a word is for none of the architectures.
        CheckpointError: A model is not there, or damaged.
    """
    names = config.arch if config.arch is not None else [] if config.models else list_models()
    common = {key: getattr(config, key) for key in ("vocab_size", "d_model", "n_layers")}
    settings: dict[str, dict[str, Any]] = {
        name: {key: value for key, value in common.items() if value is not None} for name in names
    }
    for word in words:
        key, equals, text = word.partition("=")
        name, _, key = key.partition(".")
        if name not in settings or not equals:
            expected = did_you_mean(name, names) if names else "there are no architectures beside models="
            raise ConfigError(f"{word!r} sets none of the measured architectures: {expected}")
        settings[name][key] = parse_value(text)
    found: list[tuple[str, MakeModel]] = []
    for name, own in settings.items():
        arch = architecture(name)
        arch.config.from_dict(own, f"architecture {name!r}")
        found.append((name, functools.partial(zoo.create_model, name, **own)))
    for name in config.models or []:
        model_settings(name)  # now, not after an hour of measuring
        label = Path(name).name if Path(name).exists() else name
        found.append((label, functools.partial(zoo.load_pretrained, name)))
    if not found:
        raise ConfigError("there is nothing to measure: name architectures with arch= or models with models=")
    return found


def table(kind: str, rows: Sequence[dict[str, Any]]) -> Table:
    """The results of one kind of call."""
    told = [row for row in rows if row["kind"] == kind]
    shown = Table(title=TITLES[kind], title_justify="left")
    shown.add_column("", no_wrap=True)
    for head in ("T x batch", "ms (min..max)", "tokens/s", "MiB", "state KiB", "MFLOP", "of matmul", "of copy"):
        shown.add_column(head, justify="right", no_wrap=True)
    label = None
    for row in told:
        if label not in (None, row["label"]):
            shown.add_section()
        name = "" if row["label"] == label else row["label"]
        label = row["label"]
        shown.add_row(name, f"{row['length']:,} x {row['batch']}", *_cells(row))
    return shown


def _cells(row: dict[str, Any]) -> list[str]:
    if row["status"] != OK:
        return [row["status"].replace("_", " ")]
    return [
        in_words(row["seconds"]),
        f"{row['tokens_per_second']:,.0f}",
        f"{row['peak_memory_bytes'] / 2**20:,.1f}",
        "" if row["state_bytes"] is None else f"{row['state_bytes'] / 2**10:,.0f}",
        f"{row['flops'] / 1e6:,.1f}",
        f"{row['flops_share']:.1%}",
        f"{row['bytes_share']:.1%}",
    ]


def _print_help() -> None:
    print("usage: zoo bench [arch=mamba,transformer] [lengths=512,2048] [key=value ...]   or   zoo bench kernels ...\n")
    for name, default, text in describe_settings(BenchConfig):
        print(f"  {name:<14} {text}" + (f" [{default}]" if default else ""))
    print(
        "\nSettings of one architecture follow its name: transformer.window=256. MiB: beyond weights and optimiser\n"
        "state. Of matmul, of copy: the share of what this machine reaches in a large product and a large copy, by\n"
        "counted FLOPs and by the weights and state that must move."
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))
