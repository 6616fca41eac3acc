"""Where the figures come from: machine, versions, commands, hashes, settings."""

from __future__ import annotations

import json
from typing import Any

from zoo.eval.report import words
from zoo.eval.report.blocks import Block, Cell, Column, Section, Table
from zoo.eval.report.fairness import same_batches
from zoo.eval.report.results import Comparison, number


def origin(comparison: Comparison) -> Section:
    """The section."""
    info = comparison.info
    machine = dict(info.get("machine") or {})
    blocks: list[Block] = [_pairs("Machine and time", _machine(machine) + _time(info) + _reaches(comparison))]
    versions = {"zoo": info.get("zoo_version"), **(machine.get("versions") or {})}
    blocks.append(_pairs("Versions", [(name, str(version)) for name, version in versions.items() if version]))
    blocks.append(_pairs("Commands", _commands(comparison, machine)))
    hashes = [
        (f"seed {one.seed}, {f'first {one.after:,}' if one.after else 'all'} batches", one.hash)
        for one in same_batches(comparison)
    ]
    if hashes:
        blocks.append(_pairs("Hash of the training batches", hashes))
    kernels = _kernels(comparison)
    if kernels:
        blocks.append(_pairs("Kernels used in training", kernels))
    blocks.append(_pairs("Settings of the comparison", _flat(info.get("settings") or {}), folded=True))
    blocks.append(_pairs("Settings of the data", _flat((info.get("data") or {}).get("settings") or {}), folded=True))
    for who in comparison.contestants:
        blocks.append(_pairs(f"Settings of {who.label}", _flat(who.settings), folded=True))
    return Section("origin", "Where these figures come from", [block for block in blocks if not _empty(block)])


def _machine(machine: dict[str, Any]) -> list[tuple[str, str]]:
    memory = number(machine.get("memory_bytes"))
    found = {
        "device": machine.get("device"),
        "cores": machine.get("cores"),
        "threads": machine.get("threads"),
        "instructions": machine.get("instructions"),
        "memory": words.size(memory) if memory else None,
        "platform": machine.get("platform"),
        "commit": machine.get("git_commit"),
    }
    return [(name, str(value)) for name, value in found.items() if value is not None]


def _time(info: dict[str, Any]) -> list[tuple[str, str]]:
    hours = number(info.get("hours"))
    found = [(key, str(info[key])) for key in ("started", "finished") if info.get(key)]
    return [*found, ("it took", words.duration(3600 * hours))] if hours is not None else found


def _reaches(comparison: Comparison) -> list[tuple[str, str]]:
    reaches = comparison.bench.reaches if comparison.bench else {}
    names = {
        "matmul_gflops": ("a large matrix product", "GFLOP/s"),
        "copy_gbytes_per_second": ("a memory copy", "GB/s"),
    }
    return [
        (f"{title} reaches", f"{words.digits(value)} {unit}")
        for key, (title, unit) in names.items()
        if (value := number(reaches.get(key))) is not None
    ]


def _commands(comparison: Comparison, machine: dict[str, Any]) -> list[tuple[str, str]]:
    found = [("this comparison", machine.get("command"))]
    if comparison.bench:
        found.append(("speed and memory", comparison.bench.machine.get("command")))
    for who in comparison.contestants:
        chosen = comparison.chosen(who.label)
        if chosen:
            found.append((f"{who.label}, seed {chosen[0].seed}", comparison.summary(chosen[0]).get("command")))
    said = [(name, str(command)) for name, command in found if command]
    return list({command: (name, command) for name, command in reversed(said)}.values())[::-1]


def _kernels(comparison: Comparison) -> list[tuple[str, str]]:
    found = []
    for who in comparison.contestants:
        for cell in comparison.chosen(who.label)[:1]:
            used = comparison.summary(cell).get("backends") or {}
            if used:
                found.append((who.label, ", ".join(f"{operator}: {backend}" for operator, backend in used.items())))
    return found


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return found


def _pairs(caption: str, pairs: list[tuple[str, str]], folded: bool = False) -> Table:
    rows = [[Cell(name, heading=True), Cell(value)] for name, value in pairs]
    return Table(caption, [Column("", number=False), Column("", number=False)], rows, folded)


def _empty(block: Block) -> bool:
    return isinstance(block, Table) and not block.rows
