"""What a Transformer loses and saves when its cache keeps only a part of what it has read.

Quality, of the models that length_matrix.py trains at 256 tokens: bits per byte of 100,000 bytes of unseen sources in
one stream, by cache; and of unseen windows of 256 bytes, read byte by byte with a cache of a fifth of them. Cost, of an
untrained model of 4 layers and d 256: one decoding step and the bytes of the state after 1,000, 10,000 and 100,000
tokens. A full cache of that length is filled with random keys, which costs no time to make and none to read.

    python benchmarks/cache_policies.py                 # writes benchmarks/results/cache_policies.json
    python benchmarks/cache_policies.py --only cost     # quality or cost again, keeps the other
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import zoo
from zoo.eval.measure import machine_info
from zoo.layers.attention import KVCache
from zoo.train.data.pystdlib import stdlib_corpus

HERE = Path(__file__).parent
TRAINED, STREAM = 256, 100_000
POLICIES: list[tuple[str, dict[str, Any]]] = [
    ("window", {"window": 256}),
    ("streaming", {"sinks": 1, "window": 255}),
    ("streaming", {"sinks": 4, "window": 252}),
]
FIFTH: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("window", {"window": 51}),
    ("streaming", {"sinks": 4, "window": 47}),
    ("h2o", {"recent": 24, "heavy": 24}),  # and scores and places beside its keys: as many bytes
]
DECODED: list[tuple[str, str, dict[str, Any]]] = [
    ("transformer", "full", {}),
    ("transformer", "window", {"window": 1024}),
    ("transformer", "streaming", {"sinks": 4, "window": 1020}),
    ("transformer", "h2o", {"recent": 512, "heavy": 512}),
    ("mamba", "", {}),
    ("rwkv4", "", {}),
]
POSITIONS = [1_000, 10_000, 100_000]


def test_bytes() -> torch.Tensor:
    """All test files one after the other, (T,)."""
    corpus = stdlib_corpus(Path(sysconfig.get_path("stdlib")))
    return torch.frombuffer(bytearray(b"".join(corpus.documents("test"))), dtype=torch.uint8).long()


def described(name: str, settings: dict[str, Any]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in settings.items())])


def bits(nats: torch.Tensor) -> float:
    return float(nats.mean() / math.log(2))


@torch.no_grad()
def quality(runs: Path) -> list[dict[str, Any]]:
    """Bits per byte of the stream and of the windows, by cache."""
    text, rows = test_bytes(), []
    stream = text[: STREAM + 1]

    def note(what: str, label: str, nats: torch.Tensor, **more: Any) -> None:
        rows.append({"text": what, "cache": label, "bits_per_byte": bits(nats)} | more)
        print(rows[-1], flush=True)

    for name, settings in POLICIES:
        model = zoo.load_pretrained(runs / "transformer")
        zoo.set_cache(model, name, **settings)
        nats = -zoo.score(model, stream, chunk=1024)[0]
        note("stream", described(name, settings), nats, last_tenth=bits(nats[-STREAM // 10 :]))
    transformer = zoo.load_pretrained(runs / "transformer")
    note("stream", "full", -zoo.score(transformer, stream[:8193], chunk=1024)[0], tokens=8192)
    windows = -zoo.score(transformer, stream, chunk=TRAINED, overlap=TRAINED // 2, carry=False)[0]
    note("stream", "windows of 256, each half read before", windows)
    for arch in ("mamba", "rwkv4"):
        nats = -zoo.score(zoo.load_pretrained(runs / arch), stream, chunk=1024)[0]
        note("stream", arch, nats, last_tenth=bits(nats[-STREAM // 10 :]))

    tokens = text[: 256 * (TRAINED + 1)].view(256, TRAINED + 1)
    for name, settings in FIFTH:
        model = zoo.load_pretrained(runs / "transformer")
        zoo.set_cache(model, name, **settings)
        nats = -zoo.score(model, tokens, chunk=1)  # token by token: as in decoding
        state = model.init_state(1)
        for token in tokens[:1, :TRAINED].split(1, dim=1):
            state = model(token, state=state).state
        held = zoo.state_bytes(state)
        note("windows of 256", described(name, settings), nats, last_half=bits(nats[:, 128:]), state_bytes=held)
    return rows


def filled(model: zoo.Model, state: Any, position: int) -> Any:
    """A full cache after `position` tokens, with random keys and values."""
    layers = []
    for sublayers in state.layers:
        kept = []
        for own in sublayers:
            if isinstance(own, KVCache):
                k = torch.randn(1, position, *own.k.shape[2:])
                own = KVCache(k, torch.randn_like(k), own.position + position, own.start)
            kept.append(own)
        layers.append(tuple(kept))
    return state._replace(layers=tuple(layers), position=state.position + position)


@torch.no_grad()
def cost(steps: int = 100) -> list[dict[str, Any]]:
    """Time of a decoding step and bytes of the state, by position; positions in turn."""
    rows = []
    for arch, name, settings in DECODED:
        torch.manual_seed(0)
        heads = {"n_heads": 4} if arch == "transformer" else {}
        model = zoo.create_model(arch, vocab_size=256, d_model=256, n_layers=4, **heads).eval()
        if name:
            zoo.set_cache(model, name, **settings)
        states = {}
        for position in POSITIONS:
            state = model.init_state(1)
            if name == "full":
                state = filled(model, state, position)
            else:
                for piece in torch.randint(256, (1, position)).split(2048, dim=1):
                    state = model(piece, state=state).state
            states[position] = state
        seconds: dict[int, list[float]] = {position: [] for position in POSITIONS}
        token = torch.randint(256, (1, 1))
        for turn in range(steps + 10):
            for position in POSITIONS[:: 1 if turn % 2 else -1]:
                begun = time.perf_counter()
                states[position] = model(token, state=states[position]).state
                if turn >= 10:
                    seconds[position].append(time.perf_counter() - begun)
        for position in POSITIONS:
            rows.append(
                {
                    "arch": arch,
                    "cache": described(name, settings),
                    "position": position,
                    "tokens_per_second": 1 / statistics.median(seconds[position]),
                    "over_first": statistics.median(seconds[position]) / statistics.median(seconds[POSITIONS[0]]),
                    "state_bytes": zoo.state_bytes(states[position]),
                }
            )
            print(rows[-1], flush=True)
    return rows


def show(results: dict[str, Any]) -> None:
    table = Table("architecture", "cache", "position", "tokens/s", "time over that at 1,000", "state, KiB")
    for row in results.get("cost", []):
        table.add_row(
            row["arch"],
            row["cache"],
            f"{row['position']:,}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['over_first']:.2f}",
            f"{row['state_bytes'] / 1024:,.0f}",
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/length-matrix"))
    parser.add_argument("--only", choices=("quality", "cost"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cache_policies.json")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.only and args.out.exists() else {}
    for part, measure in (("quality", lambda: quality(args.runs)), ("cost", cost)):
        if args.only in (None, part):
            results |= {"machine": machine_info(), part: measure()}
            args.out.parent.mkdir(exist_ok=True)
            args.out.write_text(json.dumps(results, indent=2) + "\n")
    show(results)


if __name__ == "__main__":
    main()
