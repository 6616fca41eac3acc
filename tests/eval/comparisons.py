"""Folders as a comparison leaves them, made up: for tests of what reads them."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = (
    "transformer",
    "mamba",
    "mamba2",
    "rwkv4",
    "rwkv7",
    "longformer",
    "bigbird",
    "hybrid",
    "landmark",
    "compressive",
)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
MACHINE = {
    "device": "cpu: Some Processor, 2 threads",
    "cores": 2,
    "threads": 2,
    "instructions": "AVX512",
    "memory_bytes": 25_276_510_208,
    "platform": "Linux x86_64",
    "versions": {"python": "3.11.7", "zoo": "0.1.0", "torch": "2.13.0"},
    "git_commit": "0123456789abcdef",
    "command": "python -m zoo.compare data=mqar",
}


def make(
    folder: Path,
    *,
    names: Sequence[str] = NAMES,
    metric: str = "acc",
    seeds: Sequence[int] = (0, 1, 2),
    lrs: Sequence[float] = (1e-3, 3e-3, 1e-2),
    failed: Sequence[tuple[str, float | None, str, str]] = (),
    slices: bool = True,
    needle_map: bool = False,
    bench: bool = True,
    runs: bool = True,
    match: str = "params",
    other_batches: str | None = None,
) -> Path:
    """Writes a comparison.

    Args:
        folder: Where.
        names: The labels.
        metric: "acc" or "bits_per_byte".
        seeds: Of each cell.
        lrs: The learning rates.
        failed: Cells without a result: label, learning rate (None: all of them), status, reason.
        slices: Whether the test data are split by length and by pairs.
        needle_map: Whether they are split by length and depth together.
        bench: Whether speed was measured.
        runs: Whether the folders of the runs are there.
        match: What was matched.
        other_batches: A label whose runs had other batches.
    """
    draws = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    higher = metric == "acc"
    rows, columns = [], _slice_columns(slices, needle_map)
    for place, name in enumerate(names):
        for lr in lrs:
            for seed in seeds:
                skill = _skill(place, len(names), math.log10(lr / lrs[len(lrs) // 2])) + draws.gauss(0, 0.012)
                final = min(1.0, max(0.0, skill)) if higher else 2.6 - skill
                row = {
                    "label": name, "arch": name, "lr": lr, "seed": seed, "status": "finished", "reason": "",
                    "chosen": int(lr == lrs[len(lrs) // 2]), "params": 240_000 + 100 * place, "steps": 2000,
                    "best_step": 1800, "tokens": 4_096_000, f"val_{metric}": final,
                    f"test_{metric}": final - 0.004 if higher else final + 0.02,
                }  # fmt: skip
                for column, hardness in columns.items():
                    row[f"test_{metric}/{column}"] = max(0.02, final - 0.25 * hardness * (1.2 - skill))
                steps = [step for step in range(100, 2001, 100) if _grown(final, step, higher) >= 0.9]
                batches = "other" if name == other_batches else "same"
                row |= {
                    "steps_to_90": steps[0] if higher and steps else "",
                    "batch_hash": hashlib.sha256(f"{seed}{batches}".encode()).hexdigest(),
                    "wall_seconds": 100 + 7 * place + draws.random(),
                    "tokens_per_second": 40_000 / (1 + 0.2 * place) + draws.gauss(0, 300),
                    "peak_memory_bytes": 900_000_000 + 10_000_000 * place,
                    "run": f"runs/{name}-lr{lr:g}-s{seed}",
                }
                for label, rate, status, reason in failed:
                    if label == name and rate in (None, lr):
                        kept = ("label", "arch", "lr", "seed", "run")
                        row = {key: row[key] if key in kept else "" for key in row} | {
                            "status": status,
                            "reason": reason,
                        }
                rows.append(row)
                if runs and row["status"] == "finished":
                    _run(folder / row["run"], row, metric, final, higher)
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    info: dict[str, Any] = {
        "settings": {"data": "mqar", "match": match, "bench": bench, "trainer": {"max_steps": 2000, "stop_at": 0.99}},
        "data": {
            "name": "mqar" if higher else "pystdlib",
            "settings": {"name": "mqar", "seq_len": 256},
            "levels": {"chance": 1 / 64, "plateau": 0.25} if higher else {},
            "facts": {"preset": "nano"},
        },
        "metric": {"name": metric, "higher_is_better": higher},
        "architectures": [_contestant(place, name, match) for place, name in enumerate(names)],
        "seeds": list(seeds), "lrs": list(lrs), "machine": MACHINE,
        "started": "2026-01-01 10:00", "finished": "2026-01-01 11:24", "hours": 1.4, "zoo_version": "0.1.0",
    }  # fmt: skip
    (folder / "comparison.json").write_text(json.dumps(info), encoding="utf-8")
    if bench:
        (folder / "bench.json").write_text(json.dumps(_bench(names, draws)), encoding="utf-8")
    return folder


def _skill(place: int, contestants: int, off: float) -> float:
    return 1.0 - 0.75 * (place / contestants) ** 1.5 - 0.35 * off**2


def _grown(final: float, step: int, higher: bool) -> float:
    share = 1 / (1 + math.exp(-(step - 700) / 160))
    return 0.02 + (final - 0.02) * share if higher else 5.5 - (5.5 - final) * min(1.0, (step / 2000) ** 0.3)


def _slice_columns(slices: bool, needle_map: bool) -> dict[str, float]:
    """Columns of slices, and how hard each is from 0 to 1."""
    columns: dict[str, float] = {}
    if slices:
        columns |= {f"seq_len={2**k}": (k - 6) / 5 for k in range(6, 12)}
        columns |= {"num_pairs=4": 0.2, "num_pairs=8": 0.5, "n_needles=1": 0.3}
    if needle_map:
        columns |= {f"seq_len={2**k},depth={d}": (k - 6) / 5 * (1 - d / 12) for k in range(7, 12, 2) for d in range(10)}
    return columns


def _run(folder: Path, row: dict[str, Any], metric: str, final: float, higher: bool) -> None:
    folder.mkdir(parents=True)
    lines = [f"step,train/loss,val/{metric}"]
    for step in range(20, 2001, 20):
        lines.append(f"{step},{4 - step / 600:.4f},{_grown(final, step, higher) if step % 100 == 0 else ''}")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    summary = {
        "batch_hash": row["batch_hash"],
        "batch_hash_after": {str(2**k): f"{row['seed']}-{2**k}" for k in range(11)},
        "backends": {"selective_scan": "numba"},
        "command": f"python -m zoo.train arch={row['arch']} seed={row['seed']}",
    }
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")


def _is_attention(name: str) -> bool:
    return name in ("transformer", "landmark", "hybrid")


def _contestant(place: int, name: str, match: str) -> dict[str, Any]:
    grows = _is_attention(name)
    target = {"params": 240_000.0, "flops": 480_000.0, "state": 65_536.0}.get(match)
    params = 240_000 + 100 * place if match == "params" else 180_000 + 21_000 * place
    return {
        "label": name, "arch": name, "settings": {"d_model": 128 - place, "n_layers": 2}, "params": params,
        "flops_per_token": 480_000 + 30_000 * place,
        "state_bytes": {str(n): 2048 * n if grows else 30_000 * (place + 1) for n in (1024, 65_536)},
        "match": {"by": match, "target": target, "reached": params, "mismatch": 0.0004 * place if target else None},
        "notes": ["causal=false is wrapped"] if name == "rwkv4" else [],
    }  # fmt: skip


def _bench(names: Sequence[str], draws: random.Random) -> dict[str, Any]:
    rows = []
    for place, name in enumerate(names):
        grows = _is_attention(name)
        for length in LENGTHS:
            slowness = (1 + length / 4096) if grows else 1.35 + 0.12 * place
            for kind, cost in (("train", 6e-5), ("prefill", 2e-5), ("decode", 3e-4)):
                batch = max(1, 8192 // length) if kind != "decode" else 1
                seconds = cost * slowness * (1 if kind == "decode" else max(length, 8192)) * draws.uniform(0.97, 1.03)
                row = {
                    "label": name, "arch": name, "kind": kind, "length": length, "batch": batch,
                    "seconds": {"median": seconds, "min": seconds * 0.96, "max": seconds * 1.07, "repeats": 7},
                    "tokens_per_second": (1 if kind == "decode" else batch * length) / seconds,
                    "peak_memory_bytes": 2e8 + (25 * length**2 if grows and kind == "train" else 3e3 * length * place),
                    "state_bytes": 2048 * length if grows else 30_000 * (place + 1),
                    "flops": 1e9 * slowness, "flops_share": 0.3, "bytes_share": 0.1,
                    "backends": {"selective_scan": "numba"}, "status": "ok", "reason": "",
                }  # fmt: skip
                if grows and kind == "train" and length >= 16384:
                    row |= {
                        "status": "out_of_memory",
                        "reason": "needs 30 GiB",
                        "seconds": None,
                        "tokens_per_second": None,
                    }
                    row["peak_memory_bytes"] = None
                if name == "rwkv4" and kind == "prefill" and length >= 32768:
                    row |= {
                        "status": "too_slow",
                        "reason": "an estimated 90 s",
                        "seconds": None,
                        "tokens_per_second": None,
                    }
                rows.append(row)
    crossovers = [
        {
            "kind": kind, "quantity": quantity, "faster": "mamba", "slower": "transformer", "from_length": length,
            "measured": True, "text": f"from T = {length:,} on, mamba {verb} transformer on this machine",
        }
        for kind, quantity, length, verb in (
            ("train", "time", 1536, "trains faster than"),
            ("train", "memory", 2816, "needs less memory to train than"),
            ("decode", "time", 1920, "decodes faster than"),
        )
        if {"mamba", "transformer"} <= set(names)
    ]  # fmt: skip
    reaches = {"matmul_gflops": 412.0, "copy_gbytes_per_second": 11.3}
    return {
        "machine": MACHINE | {"command": "python -m zoo.bench"},
        "reaches": reaches,
        "rows": rows,
        "crossovers": crossovers,
    }
