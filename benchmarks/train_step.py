"""Training steps of the zoo against peers: same sizes, same tokens, one process, rounds in turn.

A step is forward, cross-entropy, backward and a fused AdamW update in fp32. Peers with the same parametrisation get the
zoo's weights and must give the same loss before anything is timed; mambapy has the same shapes and its own weights.

    python benchmarks/train_step.py            # writes benchmarks/results/train_step.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo.eval.measure import machine_info

HERE = Path(__file__).parent
VOCABULARY, SIZE = 1000, {"d_model": 256, "n_layers": 4}
SHAPES = [(512, 4), (2048, 2), (8192, 1)]  # tokens per row, rows


def peers_module():
    """The test that copies weights into transformers' models: the benchmark compares the very same pairs."""
    path = HERE.parent / "tests" / "zoo" / "test_parity_transformers.py"
    spec = importlib.util.spec_from_file_location("parity", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class MambaPy(nn.Module):
    """mambapy's stack inside an embedding, norm and tied head like ours (its own wrapper wants more packages)."""

    def __init__(self) -> None:
        super().__init__()
        from mambapy.mamba import Mamba, MambaConfig

        self.embedding = nn.Embedding(VOCABULARY, SIZE["d_model"])
        self.layers = Mamba(MambaConfig(d_model=SIZE["d_model"], n_layers=SIZE["n_layers"]))
        self.norm = nn.RMSNorm(SIZE["d_model"])

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        return F.linear(self.norm(self.layers(self.embedding(tokens))), self.embedding.weight)


def stepper(model: nn.Module, tokens: Tensor) -> Callable[[], float]:
    """One training step on those tokens; returns the loss before the update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        logits = model(tokens)
        logits = getattr(logits, "logits", logits)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def in_turn(steps: dict[str, Callable[[], float]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each step in each round; the order is turned round every time. At least two rounds after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    begun = time.perf_counter()
    for turn in range(rounds + 1):
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            steps[name]()
            if turn:
                times[name].append(time.perf_counter() - start)
        if turn >= 2 and time.perf_counter() - begun > seconds:
            break
    return times


def copied(ours: zoo.Model, build: Callable) -> nn.Module:
    """The peer with our weights."""
    theirs, sources = build(ours)
    parity, weights = peers_module(), dict(ours.named_parameters())
    with torch.no_grad():
        for name, source in sources.items():
            target = theirs.get_parameter(name)
            target.copy_(parity.ours_for(source, weights, target))
    return theirs


def compare(arch: str, peer: str, length: int, rows: int, rounds: int, seconds: float) -> dict:
    """One row of the table."""
    torch.manual_seed(0)
    d_ff = {"d_ff": 688, "n_heads": 4} if arch == "transformer" else {}
    ours = zoo.create_model(arch, vocab_size=VOCABULARY, **SIZE, **d_ff)
    if peer == "mambapy":
        theirs: nn.Module = MambaPy()
        assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    else:
        theirs = copied(ours, getattr(peers_module(), "llama" if arch == "transformer" else "mamba"))
    tokens = torch.randint(VOCABULARY, (rows, length))
    steps = {"ours": stepper(ours, tokens), "theirs": stepper(theirs, tokens)}
    if peer != "mambapy":  # the gate: the same function, or no timing
        losses = {name: step() for name, step in steps.items()}
        assert abs(losses["ours"] / losses["theirs"] - 1) < 1e-4, losses
    times = in_turn(steps, rounds, seconds)
    ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["theirs"], strict=True)]
    return {
        "arch": arch,
        "peer": peer,
        "length": length,
        "rows": rows,
        "tokens_per_second": length * rows / statistics.median(times["ours"]),
        "peer_tokens_per_second": length * rows / statistics.median(times["theirs"]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "rounds": len(ratios),
    }


def per_token(arch: str, short: int, long: int, rounds: int) -> dict:
    """Time per token of a training step at a long and a short length; the short one runs as many tokens."""
    torch.manual_seed(0)
    model = zoo.create_model(arch, vocab_size=VOCABULARY, **SIZE)
    steps = {
        "long": stepper(model, torch.randint(VOCABULARY, (1, long))),
        "short": stepper(model, torch.randint(VOCABULARY, (long // short, short))),
    }
    times = in_turn(steps, rounds, 600)
    ratios = [a / b for a, b in zip(times["long"], times["short"], strict=True)]
    return {"arch": arch, "short": short, "long": long, "ratio": statistics.median(ratios), "rounds": len(ratios)}


def write(path: Path, rows: list[dict], lengths: list[dict]) -> None:
    """Writes what is measured so far: a slow peer that is cut short takes nothing with it."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine_info(), "steps": rows, "per_token": lengths}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60, help="per comparison, beyond its second round")
    parser.add_argument("--only", help="run the comparisons whose peer has this in its name")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "train_step.json")
    args = parser.parse_args()

    pairs = [("transformer", "transformers LlamaForCausalLM (SDPA)", shape) for shape in SHAPES]
    pairs += [("mamba", "mambapy", shape) for shape in SHAPES[:2]]
    pairs += [("mamba", "transformers MambaForCausalLM", SHAPES[0])]
    table = Table("architecture", "peer", "tokens", "ours tok/s", "peer tok/s", "ratio (min..max)")
    rows = []
    for arch, peer, (length, batch) in pairs:
        if args.only and args.only not in peer:
            continue
        row = compare(arch, peer, length, batch, args.rounds, args.seconds)
        rows.append(row)
        shown = f"{row['ratio']:.2f} ({row['ratio_min']:.2f}..{row['ratio_max']:.2f})"
        speeds = [f"{row[key]:,.0f}" for key in ("tokens_per_second", "peer_tokens_per_second")]
        table.add_row(arch, peer, f"{length} x {batch}", *speeds, shown)
        print(json.dumps(row), flush=True)
        write(args.out, rows, [])
    lengths = [] if args.only else [per_token("mamba", 1024, 32768, 5)]
    Console(width=140).print(table)
    for row in lengths:
        print(f"{row['arch']}: time per token at {row['long']} over {row['short']}: {row['ratio']:.3f}")
    write(args.out, rows, lengths)


if __name__ == "__main__":
    main()
