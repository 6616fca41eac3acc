"""Training steps of the zoo against peers: same sizes, same tokens, one process, rounds in turn.

A step is forward, cross-entropy, backward and a fused AdamW update in fp32. Peers with the same parametrisation get the
zoo's weights and must give the same loss before anything is timed; mambapy has the same shapes and its own weights.
Peak memory is that of one step beyond weights and optimiser state, each model in a process of its own.

    python benchmarks/train_step.py                    # writes benchmarks/results/train_step.json
    python benchmarks/train_step.py --only rwkv4       # measures these rows again, keeps the others
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo.eval.measure import machine_info, peak_memory_bytes
from zoo.layers.attention import BERT

HERE = Path(__file__).parent
VOCABULARY, SIZE = 1000, {"d_model": 256, "n_layers": 4}
SHAPES = [(512, 4), (2048, 2), (8192, 1)]  # tokens per row, rows
LLAMA, MAMBAPY = "transformers LlamaForCausalLM (SDPA)", "mambapy"
PEERS = {LLAMA: "llama", "transformers MambaForCausalLM": "mamba"}
PEERS |= {"transformers Mamba2ForCausalLM": "mamba2", "transformers RwkvForCausalLM": "rwkv4"}
PEERS |= {"transformers LongformerForMaskedLM": "longformer", "transformers BigBirdForMaskedLM": "bigbird"}
OURS, OURS_SHORT = "the zoo's transformer", "the zoo's transformer, rows of 512"
ENCODER = {**BERT, "n_heads": 4, "d_ff": 1024}
FORMS = {
    "transformer": ("transformer", {"n_heads": 4, "d_ff": 688}),
    "longformer": ("longformer", {"n_heads": 4, "d_ff": 688, "window": 256}),
    "bigbird": ("bigbird", {"n_heads": 4, "d_ff": 688}),
    "landmark": ("landmark", {"n_heads": 4, "d_ff": 688, "block_size": 64}),
    "landmark, top 4": ("landmark", {"n_heads": 4, "d_ff": 688, "block_size": 64, "top_k": 4}),
    "transformer_xl": ("transformer_xl", {"n_heads": 4, "d_ff": 688, "segment": 512, "memory": 512}),
    "compressive": (
        "compressive",
        {"n_heads": 4, "d_ff": 688, "segment": 512, "memory": 512, "compressed_memory": 128, "rate": 4},
    ),
    "longformer both ways": ("longformer", {"n_heads": 4, "d_ff": 688, "window": 256, "causal": False}),
    "longformer encoder": ("longformer", {**ENCODER, "window": 256, "n_global": 0}),
    "bigbird encoder": ("bigbird", {**ENCODER, "plan": "transformers"}),
}
PLAN = [("transformer", LLAMA, shape) for shape in SHAPES]
PLAN += [("mamba", MAMBAPY, shape) for shape in SHAPES[:2]]
PLAN += [("mamba2", "transformers Mamba2ForCausalLM", shape) for shape in SHAPES]
PLAN += [(arch, OURS, shape) for arch in ("mamba", "mamba2", "rwkv4", "rwkv7") for shape in SHAPES]
PLAN += [("rwkv4", "transformers RwkvForCausalLM", shape) for shape in SHAPES]
PLAN += [(arch, OURS, shape) for arch in ("longformer", "bigbird") for shape in SHAPES]
PLAN += [("landmark", OURS, SHAPES[1])]
PLAN += [(arch, OURS_SHORT, SHAPES[1]) for arch in ("transformer_xl", "compressive")]
PLAN += [("longformer encoder", "transformers LongformerForMaskedLM", shape) for shape in SHAPES]
PLAN += [("bigbird encoder", "transformers BigBirdForMaskedLM", shape) for shape in SHAPES]
PLAN += [("mamba", "transformers MambaForCausalLM", SHAPES[0])]  # the slowest last
RECURRENT, SPARSE = ("mamba", "mamba2", "rwkv4", "rwkv7"), ("longformer", "bigbird", "longformer both ways")
QUESTION = ("arch", "peer", "length", "rows", "short", "long", "early", "late")
MEMORY = ("peak_memory_bytes", "peer_peak_memory_bytes")


def peers_modules():
    """The tests that copy weights into transformers' models: the benchmark compares the very same pairs."""
    sys.path.insert(0, str(HERE.parent))
    return [
        importlib.import_module(f"tests.zoo.{name}") for name in ("test_parity_transformers", "test_parity_encoders")
    ]


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


def stepper(model: nn.Module, tokens: Tensor, optimizer: torch.optim.Optimizer | None = None) -> Callable[[], float]:
    """One training step on those tokens; returns the loss before the update."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

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


def copied(ours: zoo.Model, peer: str) -> nn.Module:
    """The peer with our weights."""
    build = next(getattr(module, PEERS[peer]) for module in peers_modules() if hasattr(module, PEERS[peer]))
    theirs, sources = build(ours)
    importlib.import_module("tests.zoo.parity").copy_weights(ours, theirs, sources)
    return theirs.train()


def our_model(arch: str, length: int = 0) -> zoo.Model:
    torch.manual_seed(0)
    name, settings = FORMS.get(arch, (arch, {}))
    if "mlm_head" in settings:
        settings = {**settings, "max_positions": length}
    return zoo.create_model(name, vocab_size=VOCABULARY, **SIZE, **settings)


def peer_model(arch: str, peer: str, length: int) -> nn.Module:
    if peer in (OURS, OURS_SHORT):
        return our_model("transformer")
    return MambaPy() if peer == MAMBAPY else copied(our_model(arch, length), peer)


def prepare(arch: str, peer: str | None, length: int, rows: int) -> Callable[[], float]:
    """For the memory measurement: a short step first, so that code is compiled and the optimiser has its state."""
    model = our_model(arch, length) if peer is None else peer_model(arch, peer, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    stepper(model, torch.randint(VOCABULARY, (1, 16)), optimizer)()
    return stepper(model, torch.randint(VOCABULARY, (rows, length)), optimizer)


def compare(arch: str, peer: str, length: int, rows: int, rounds: int, seconds: float) -> dict:
    """One row of the table."""
    ours, theirs = our_model(arch, length), peer_model(arch, peer, length)
    tokens = torch.randint(2, VOCABULARY, (rows, length))  # 0 and 1 are padding to some peers
    theirs_read = tokens.view(-1, 512) if peer == OURS_SHORT else tokens
    steps = {"ours": stepper(ours, tokens), "theirs": stepper(theirs, theirs_read)}
    if peer == MAMBAPY:
        assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    elif peer not in (OURS, OURS_SHORT):  # the gate: the same function, or no timing
        losses = {name: step() for name, step in steps.items()}
        assert abs(losses["ours"] / losses["theirs"] - 1) < 1e-4, losses
    times = in_turn(steps, rounds, seconds)
    ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["theirs"], strict=True)]
    row = {
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
    if peer not in (OURS, OURS_SHORT):
        row["peak_memory_bytes"] = peak_memory_bytes(prepare, arch, None, length, rows)
        row["peer_peak_memory_bytes"] = peak_memory_bytes(prepare, arch, peer, length, rows)
    return row


def per_token(arch: str, short: int, long: int, rounds: int) -> dict:
    """Time and memory of a training step at a long and a short length; the short one runs as many tokens."""
    model = our_model(arch)
    steps = {
        "long": stepper(model, torch.randint(VOCABULARY, (1, long))),
        "short": stepper(model, torch.randint(VOCABULARY, (long // short, short))),
    }
    times = in_turn(steps, rounds, 600)
    ratios = [a / b for a, b in zip(times["long"], times["short"], strict=True)]
    row = {"arch": arch, "short": short, "long": long, "ratio": statistics.median(ratios), "rounds": len(ratios)}
    memory = [peak_memory_bytes(prepare, arch, None, t, long // t) for t in (long, short)]
    return row | {"peak_memory_bytes": memory[0], "memory_ratio": memory[0] / memory[1]}


def decoding(arch: str, early: int = 100, late: int = 100_000, steps: int = 200, read: str | None = None) -> dict:
    """Time of one decoding step late in a text over that of an early one; `read`: how it reads its memory then."""
    model, token = our_model(arch).eval(), torch.randint(VOCABULARY, (1, 1))
    seconds: dict[int, list[float]] = {}
    with torch.no_grad():
        states = {}
        for position in (early, late):
            state = model.init_state(1)
            for piece in torch.randint(VOCABULARY, (1, position)).split(10_000, dim=1):
                state = model(piece, state=state).state
            states[position] = state
        if read is not None:
            zoo.set_cache(model, read)
        held = zoo.state_bytes(states[late])
        for turn in range(steps + 10):
            for position in (early, late) if turn % 2 else (late, early):
                begun = time.perf_counter()
                states[position] = model(token, state=states[position]).state
                if turn >= 10:
                    seconds.setdefault(position, []).append(time.perf_counter() - begun)
    medians = {position: statistics.median(values) for position, values in seconds.items()}
    return {
        "arch": arch if read is None else f"{arch}, then {read}",
        "early": early,
        "late": late,
        "seconds": medians[late],
        "seconds_max": max(seconds[late]),
        "ratio": medians[late] / medians[early],
        "state_bytes": held,
    }


def show(results: dict[str, list[dict]]) -> None:
    table = Table("architecture", "peer", "tokens", "ours tok/s", "peer tok/s", "ratio (min..max)", "MiB ours / peer")
    for row in results["steps"]:
        ratio = f"{row['ratio']:.2f} ({row['ratio_min']:.2f}..{row['ratio_max']:.2f})"
        speeds = [f"{row[key]:,.0f}" for key in ("tokens_per_second", "peer_tokens_per_second")]
        memory = " / ".join(f"{row[key] / 2**20:,.0f}" for key in MEMORY if key in row)
        table.add_row(row["arch"], row["peer"], f"{row['length']} x {row['rows']}", *speeds, ratio, memory)
    Console(width=160).print(table)
    for row in results["per_token"]:
        memory = f"; memory: {row['memory_ratio']:.3f}" if "memory_ratio" in row else ""
        print(f"{row['arch']}: time per token at {row['long']:,} over {row['short']:,}: {row['ratio']:.3f}{memory}")
    for row in results["decoding"]:
        at = f"at position {row['late']:,} over {row['early']:,}"
        print(f"{row['arch']}: one decoding step {1e3 * row['seconds']:.2f} ms, {at}: {row['ratio']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60, help="per comparison, beyond its second round")
    parser.add_argument("--only", default="", help="measure the rows that have this in 'ARCH against PEER'")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "train_step.json")
    args = parser.parse_args()

    commit = machine_info()["git_commit"]
    results: dict[str, list[dict]] = {"steps": [], "per_token": [], "decoding": []}
    if args.only and args.out.exists():
        results |= {kind: json.loads(args.out.read_text()).get(kind, []) for kind in results}

    def keep(kind: str, row: dict) -> None:
        """Replaces the row of the same question, and writes at once: what is cut short later takes nothing away."""
        same = [old for old in results[kind] if all(old.get(key) == row.get(key) for key in QUESTION)]
        results[kind] = [old for old in results[kind] if old not in same] + [row | {"git_commit": commit}]
        print(json.dumps(row), flush=True)
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine_info()} | results, indent=2) + "\n")

    for arch in RECURRENT:
        if args.only in f"{arch} against length":
            keep("per_token", per_token(arch, 1024, 32768, 5))
            keep("decoding", decoding(arch))
    if args.only in "landmark, top 4 against length":
        keep("decoding", decoding("landmark, top 4"))
        keep("decoding", decoding("landmark, top 4", steps=10, read="full"))
    for arch in SPARSE:
        if args.only in f"{arch} against length":
            keep("per_token", per_token(arch, 2048, 65536, 3))
    for arch, peer, (length, rows) in PLAN:
        if args.only in f"{arch} against {peer}":
            keep("steps", compare(arch, peer, length, rows, args.rounds, args.seconds))
    show(results)


if __name__ == "__main__":
    main()
