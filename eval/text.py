"""What a language model makes of distant text: perplexity by position, and a key hidden in filler.

Letters: W windows, T tokens.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator

import numpy as np
import torch

from zoo.codec import Codec
from zoo.generation import generate
from zoo.kernels.errors import DataError
from zoo.model import Model
from zoo.scoring import score
from zoo.train.data.text import PackedText

FIRST_BUCKET = 64
"""Positions below this are one bucket, and the warm-up that the gain leaves out."""
RESAMPLES = 1000


def windows(source: PackedText, split: str, length: int, count: int) -> torch.Tensor:
    """Stretches of documents, each inside one document, (W, length + 1), at most `count`, spread over the split.

    Raises:
        DataError: No document is that long.
    """
    found: list[np.ndarray] = []
    for document in source.corpus.documents(split):
        ids = source.codec.encode_document(document)[0]
        found += [ids[at : at + length + 1] for at in range(0, len(ids) - length, length + 1)]
    if not found:
        raise DataError(f"data={source.name}: no document of the {split} split has {length + 1} tokens: read less far")
    chosen = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
    return torch.from_numpy(np.stack([found[i] for i in chosen]).astype(np.int64))


def by_position(model: Model, tokens: torch.Tensor, *, chunk: int = 4096, seed: int = 0) -> dict[str, float]:
    """Perplexity by position, each window read with a fresh state.

    Args:
        model: A causal model.
        tokens: (W, T + 1).
        chunk: Tokens read at once.
        seed: Of the bootstrap.

    Returns:
        "perplexity", and for buckets of positions that double in width "perplexity/position=64-127" with the ends of a
        95 % bootstrap interval over the windows, "low/..." and "high/..."; "gain", the nats per token by which the last
        tenth of the positions is easier than a tenth at the beginning, the first 64 left out.
    """
    nats = -score(model, tokens, chunk=chunk).double().numpy()  # (W, T)
    draws = np.random.default_rng(seed).integers(len(nats), size=(RESAMPLES, len(nats)))
    results = {"perplexity": math.exp(nats.mean())}
    edges = [0, FIRST_BUCKET]
    while edges[-1] < nats.shape[1]:
        edges.append(2 * edges[-1])
    for begin, end in itertools.pairwise(edges):
        means = nats[:, begin:end].mean(1)  # (W,)
        suffix = f"position={begin}-{min(end, nats.shape[1]) - 1}"
        low, high = np.exp(np.quantile(means[draws].mean(1), (0.025, 0.975)))
        results[f"perplexity/{suffix}"] = math.exp(means.mean())
        results[f"low/{suffix}"], results[f"high/{suffix}"] = float(low), float(high)
    tenth = max(1, (nats.shape[1] - FIRST_BUCKET) // 10)
    if nats.shape[1] >= FIRST_BUCKET + 2 * tenth:
        early = nats[:, FIRST_BUCKET : FIRST_BUCKET + tenth].mean()
        results["gain"] = float(early - nats[:, -tenth:].mean())
    return results


FILLER = "A cup stands on the table. Rain falls on the roof. The dog sleeps by the door. Somebody reads a letter. "
TASK = "Somewhere in the long text below a secret number is told. Read on until it comes, and keep it in mind.\n"
QUESTION = "Which number was told? It was "


def hidden_number(length: int, depth: float, key: int) -> str:
    """A prompt of about `length` characters with a number at a depth from 0 (begin) to 1 (end).

    The form is that of the passkey test of Landmark attention (Mohtashami and Jaggi 2023, arXiv 2305.16300), in
    words of our own.
    """
    statement = f"\nThe secret number: {key}. Once more, the secret number: {key}.\n"
    room = max(0, length - len(TASK) - len(statement) - len(QUESTION) - 1)
    before = round(depth * room)
    text = FILLER * (room // len(FILLER) + 1)
    return f"{TASK}{text[:before]}{statement}{text[: room - before]}\n{QUESTION}"


def find_number(
    model: Model,
    codec: Codec,
    *,
    lengths: tuple[int, ...] = (512, 1024, 2048),
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
    trials: int = 2,
    seed: int = 0,
) -> Iterator[tuple[int, float, float]]:
    """Yields (length in characters, depth, share of trials whose continuation begins with the number)."""
    draws = np.random.default_rng(seed)
    for length in lengths:
        for depth in depths:
            right = 0
            for _ in range(trials):
                key = int(draws.integers(1, 50_001))
                prompt = torch.tensor([codec.encode(hidden_number(length, depth, key))])
                made = generate(model, prompt, max_new_tokens=10, temperature=0)[0, prompt.shape[1] :]
                said = re.search(r"\d+", codec.decode(made.tolist()))
                right += said is not None and int(said[0]) == key
            yield length, depth, right / trials
