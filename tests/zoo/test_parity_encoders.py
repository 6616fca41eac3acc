"""Encoders against `transformers`, with copied random weights: logits, loss and every gradient.

Letters: B batch, T time, H heads, N blocks of queries, R random blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BigBirdConfig,
    BigBirdForMaskedLM,
    LongformerConfig,
    LongformerForMaskedLM,
)
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

import zoo
from zoo.layers.attention import BERT
from zoo.layers.random_blocks import transformers_plan

from .parity import Source, assert_parity, copy_weights, randomise, relative_error

VOCAB = 31
PAD = {"longformer": 1, "bigbird": 0, "transformer": 0}
SMALL = {"d_model": 24, "n_heads": 3, "d_ff": 28, "n_layers": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def encoder(name: str, **settings: Any) -> zoo.Model:
    model = zoo.create_model(name, vocab_size=VOCAB, **{**BERT, "max_positions": 256, **SMALL, **settings})
    randomise(model)
    return model


def shared_sizes(ours: zoo.Model) -> dict[str, Any]:
    c = ours.config
    return NO_DROPOUT | {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "intermediate_size": c.d_ff,
        "layer_norm_eps": c.norm_eps,
        "pad_token_id": PAD[ours.architecture],
        "tie_word_embeddings": c.tie_embeddings,
    }


def longformer(ours: zoo.Model) -> tuple[nn.Module, dict[str, Source]]:
    c = ours.config
    padding = PAD["longformer"]
    windows = [2 * w for w in c.windows] if c.windows else 2 * c.window
    config = LongformerConfig(
        **shared_sizes(ours), attention_window=windows, max_position_embeddings=c.max_positions + padding + 1
    )
    theirs = LongformerForMaskedLM(config)
    sources = embeddings("longformer", padding + 1) | head("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")
    width = c.d_model
    for i in range(c.n_layers):
        layer, queries = f"longformer.encoder.layer.{i}", f"blocks.{i}.mixers.0.global_queries"
        sources |= block(layer, i, width)
        for part, name in {"query": "query", "key": "key", "value": "value"}.items():
            sources[f"{layer}.attention.self.{part}_global.weight"] = f"{queries}.{name}.weight"
            sources[f"{layer}.attention.self.{part}_global.bias"] = f"{queries}.{name}.bias"
        sources[f"{layer}.attention.self.key_global.bias"] = lambda *_: torch.zeros(width)  # a softmax does not see it
    return theirs, sources


def bigbird(ours: zoo.Model) -> tuple[nn.Module, dict[str, Source]]:
    c = ours.config
    config = BigBirdConfig(
        **shared_sizes(ours),
        hidden_act={"gelu": "gelu", "gelu_tanh": "gelu_new"}[c.feed_forward],
        max_position_embeddings=c.max_positions,
        block_size=c.block_size,
        num_random_blocks=c.n_random_blocks,
        sep_token_id=None,
    )
    theirs = BigBirdForMaskedLM(config)
    theirs.bert.pooler = None  # which the masked model does not read
    return theirs, like_bert(ours)


def bert(ours: zoo.Model) -> tuple[nn.Module, dict[str, Source]]:
    theirs = BertForMaskedLM(BertConfig(**shared_sizes(ours), max_position_embeddings=ours.config.max_positions))
    return theirs, like_bert(ours)


def like_bert(ours: zoo.Model) -> dict[str, Source]:
    transform = "cls.predictions.transform"
    sources = embeddings("bert", 0) | head(f"{transform}.dense", f"{transform}.LayerNorm", "cls.predictions.bias")
    for i in range(ours.config.n_layers):
        sources |= block(f"bert.encoder.layer.{i}", i, ours.config.d_model)
    return sources


def embeddings(model: str, unused: int) -> dict[str, Source]:
    """The embeddings; `unused` rows come before the first position, and type 0 is part of our positions."""
    kind = torch.linspace(-0.3, 0.3, 2)[:, None]  # of the two types, alike in all channels

    def positions(tensors: dict[str, Tensor], gradient: bool) -> Tensor:
        own = tensors["positions.weight"]
        return F.pad(own if gradient else own - kind[0], (0, 0, unused, 0))

    def types(tensors: dict[str, Tensor], gradient: bool) -> Tensor:
        own = tensors["positions.weight"]
        if not gradient:
            return kind.expand(-1, own.shape[1])
        return torch.stack((own.sum(0), torch.zeros_like(own[0])))

    norm = f"{model}.embeddings.LayerNorm"
    return {
        f"{model}.embeddings.word_embeddings.weight": "embedding.weight",
        f"{model}.embeddings.position_embeddings.weight": positions,
        f"{model}.embeddings.token_type_embeddings.weight": types,
        f"{norm}.weight": "embedding_norm.weight",
        f"{norm}.bias": "embedding_norm.bias",
    }


def head(dense: str, norm: str, bias: str) -> dict[str, Source]:
    sources: dict[str, Source] = {bias: "head_bias"}
    for kind in ("weight", "bias"):
        sources |= {f"{dense}.{kind}": f"transform.0.{kind}", f"{norm}.{kind}": f"transform.2.{kind}"}
    return sources


def block(layer: str, i: int, width: int) -> dict[str, Source]:
    ours, sources = f"blocks.{i}", {}
    for kind in ("weight", "bias"):
        for n, part in enumerate(("query", "key", "value")):
            rows = slice(n * width, (n + 1) * width)
            sources[f"{layer}.attention.self.{part}.{kind}"] = (f"{ours}.mixers.0.qkv_proj.{kind}", rows)
        sources |= {
            f"{layer}.attention.output.dense.{kind}": f"{ours}.mixers.0.out_proj.{kind}",
            f"{layer}.attention.output.LayerNorm.{kind}": f"{ours}.norms.0.{kind}",
            f"{layer}.intermediate.dense.{kind}": f"{ours}.mixers.1.up_proj.{kind}",
            f"{layer}.output.dense.{kind}": f"{ours}.mixers.1.down_proj.{kind}",
            f"{layer}.output.LayerNorm.{kind}": f"{ours}.norms.1.{kind}",
        }
    return sources


Build = Callable[[zoo.Model], tuple[nn.Module, dict[str, Source]]]


def compare(
    build: Build,
    ours: zoo.Model,
    lengths: list[int],
    marks: Tensor | None = None,
    training: bool = True,
    no_globals: bool = False,
) -> nn.Module:
    """Runs both on one row per length, padded to the longest; returns theirs.

    Args:
        build: Makes theirs.
        ours: Our model.
        lengths: Tokens of each row.
        marks: Which tokens are global, (B, T); None: nothing is said about that.
        training: Training mode; there is no dropout, but BigBird differs.
        no_globals: No token is global.
    """
    theirs, sources = build(ours)
    copy_weights(ours, theirs, sources)
    ours.train(training)
    theirs.train(training)
    padding = PAD[ours.architecture]
    shape = len(lengths), max(lengths)
    read = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(2, VOCAB, shape).masked_fill(~read, padding)
    targets = torch.randint(VOCAB, shape).masked_fill(~read, -100)
    extra: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    if marks is not None:
        extra["global_attention_mask"] = marks.long()
        given["global_tokens"] = marks
    if not read.all():
        extra["attention_mask"] = read.long()
        given["segment_ids"] = (~read).long()

    def without_effect(name: str) -> bool:
        unused = no_globals and "_global." in name
        return name.endswith(("self.key.bias", "key_global.bias")) or unused or max(lengths) == 1

    expected = theirs(tokens, **extra).logits
    assert_parity(ours, theirs, sources, ours(tokens, **given).logits, expected, targets, without_effect)
    return theirs


def marks_at(time: int, *rows: list[int]) -> Tensor:
    marks = torch.zeros(len(rows), time, dtype=torch.bool)
    for row, places in zip(marks, rows, strict=True):
        row[places] = True
    return marks


@pytest.mark.parametrize("lengths", [[1], [2, 1], [40, 40], [63, 17, 62]], ids=str)
def test_bert(lengths) -> None:
    compare(bert, encoder("transformer"), lengths)


LONGFORMERS = {
    "one window": {"window": 4},
    "windows that grow": {"windows": [2, 8, 4], "n_layers": 3},
    "windows that shrink": {"windows": [16, 2]},  # theirs fails on 1
}


@pytest.mark.parametrize("time", [1, 3, 8, 31, 64, 150])
@pytest.mark.parametrize("size", LONGFORMERS.values(), ids=LONGFORMERS)
def test_longformer_without_global_tokens(size, time) -> None:
    compare(longformer, encoder("longformer", n_global=0, **size), [time, time], no_globals=True)


def test_marks_can_say_that_none_is_global() -> None:
    ours = encoder("longformer", window=4)  # by itself, the first would be
    compare(longformer, ours, [40, 40], marks_at(40, [], []), no_globals=True)


@pytest.mark.parametrize("size", LONGFORMERS.values(), ids=LONGFORMERS)
@pytest.mark.parametrize(
    ("time", "places"),
    {
        "the first": (70, [[0], [0]]),
        "the last": (67, [[66], [66]]),
        "neighbours": (70, [[10, 11, 12, 40], [12, 14, 69, 33]]),
        "different numbers": (130, [[0, 5, 64, 65, 100, 129], [77], [3, 4]]),
        "some rows without": (70, [[], [5, 6], []]),
        "all of a row": (20, [list(range(20)), [7]]),
        "shorter than the window": (3, [[1], [0, 2]]),
    }.values(),
    ids=str,
)
def test_longformer_with_global_tokens(size, time, places) -> None:
    compare(longformer, encoder("longformer", **size), [time] * len(places), marks_at(time, *places))


def test_the_first_token_of_longformer_is_global_by_itself() -> None:
    ours, tokens = encoder("longformer", window=4).eval(), torch.randint(2, VOCAB, (2, 50))
    theirs, sources = longformer(ours)
    copy_weights(ours, theirs, sources)
    with torch.no_grad():
        expected = theirs.eval()(tokens, global_attention_mask=marks_at(50, [0], [0]).long()).logits
        assert relative_error(ours(tokens).logits, expected) < 1e-4


@pytest.mark.parametrize("size", LONGFORMERS.values(), ids=LONGFORMERS)
@pytest.mark.parametrize(
    ("lengths", "places"),
    [
        ([70, 66, 3], None),
        ([64, 1], None),
        ([70, 66, 3], [[0], [0], [0]]),
        ([70, 30, 9], [[69, 3], [29, 28, 27, 1, 15], []]),
        ([130, 64], [[64], [63, 0, 100]]),  # the last one is padding, which is never global
    ],
    ids=str,
)
def test_longformer_with_padding(size, lengths, places) -> None:
    settings = {"n_global": 0} if places is None else {}
    marks = None if places is None else marks_at(max(lengths), *places)
    ours = encoder("longformer", **settings, **size)
    compare(longformer, ours, lengths, marks, no_globals=places is None)


BIGBIRDS = {
    # (tokens, settings); the plan of lengths 1024, 3072 and 4096 is another one
    "12 blocks": (768, {"max_positions": 1024}),
    "1024": (1024, {"max_positions": 1024}),
    "1024 of 4096": (1024, {"max_positions": 4096}),
    "1280": (1280, {"max_positions": 2048}),
    "filled up to 1024": (1000, {"max_positions": 1024}),
    "filled up": (741, {"max_positions": 1024}),
    "3072": (3072, {"max_positions": 3072, "d_model": 8, "n_heads": 2, "d_ff": 8}),
    "small blocks": (132, {"block_size": 8, "n_random_blocks": 2, "n_layers": 3}),
    "one random block": (61, {"block_size": 8, "n_random_blocks": 1}),
    "blocks of 16 at 1024": (1024, {"block_size": 16, "n_random_blocks": 2, "max_positions": 1024}),
    "most random blocks": (240, {"block_size": 8, "n_random_blocks": 5}),
    "exact gelu": (200, {"block_size": 8, "feed_forward": "gelu"}),
    "up to the switch": (88, {"block_size": 8}),
    "behind the switch": (89, {"block_size": 8}),
    "one block": (7, {"block_size": 8}),
    "one token": (1, {"block_size": 8}),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("time", "settings"), BIGBIRDS.values(), ids=BIGBIRDS)
def test_bigbird(time, settings, training) -> None:
    settings = {"plan": "transformers", "feed_forward": "gelu_tanh", "mlm_head": "gelu_tanh"} | settings
    settings["mlm_head"] = settings["feed_forward"]  # theirs has one activation
    ours = encoder("bigbird", **settings)
    theirs = compare(bigbird, ours, [time] * (1 if time > 1024 else 2), training=training)
    sparse = time > (2 * ours.config.n_random_blocks + 5) * ours.config.block_size
    assert theirs.bert.attention_type == ("block_sparse" if sparse else "original_full")


PLANS = [(64, 3, 4096, time) for time in range(768, 4097, 64)]
PLANS += [(64, 3, 1024, 1024), (64, 3, 1024, 960), (64, 1, 4096, 1024), (64, 4, 3072, 3072), (128, 2, 4096, 4096)]
PLANS += [(16, 3, 4096, 1024), (16, 2, 1024, 1024), (32, 3, 3072, 3072), (256, 1, 2048, 2304), (512, 1, 4096, 4096)]
PLANS += [(8, r, 512, (6 + 2 * r + more) * 8) for r in (1, 2, 3, 6) for more in (0, 1, 5, 30)]


@pytest.mark.parametrize("layer", [0, 1, 7])
def test_random_blocks_are_those_of_transformers(layer: int) -> None:
    for block_size, n_random, most, time in PLANS:
        config = BigBirdConfig(
            hidden_size=6,
            num_attention_heads=3,
            block_size=block_size,
            num_random_blocks=n_random,
            max_position_embeddings=most,
        )
        theirs = BigBirdBlockSparseAttention(config, layer).train()
        np.random.seed(layer)  # noqa: NPY002 - the generator that it draws from
        if time in (1024, 3072, 4096):
            tables = [
                theirs._bigbird_block_rand_mask(most, most, block_size, block_size, n_random, last_idx=1024)
                for _ in range(3)
            ]
            tables = [table[: time // block_size - 2] for table in tables]
        else:
            lengths, numbers = theirs._get_rand_attn_plan(time, block_size, n_random)
            tables = theirs._bigbird_block_rand_mask_with_head(
                time, time, block_size, block_size, 3, plan_from_length=lengths, plan_num_rand_blocks=numbers
            )
        expected = F.pad(torch.from_numpy(np.stack(tables)).long(), (0, 0, 1, 1), value=-1)  # (H, N, R)
        actual = transformers_plan(time // block_size, block_size, n_random, 3, layer, most // block_size)
        assert torch.equal(actual, expected), (block_size, n_random, most, time)
