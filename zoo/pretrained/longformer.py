"""Longformer with its masked-language-model head, in the layout of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.architectures.longformer import LongformerConfig
from zoo.pretrained.convert import Table, norm_links
from zoo.pretrained.encoders import INERT, RENAMES, encoder_table, read_encoder, write_encoder
from zoo.pretrained.family import Family, Published, insist

PAD = 1
"""Of RoBERTa's vocabulary; its positions begin with the row after it."""


def read(theirs: Published) -> dict[str, Any]:
    """See `Family.read`."""
    windows, layers = theirs("attention_window", 512), theirs("num_hidden_layers")
    windows = [windows] * layers if isinstance(windows, int) else list(windows)
    reach = [window // 2 for window in windows]
    return read_encoder(theirs, "gelu", "gelu") | {
        "max_positions": theirs("max_position_embeddings") - theirs("pad_token_id", PAD) - 1,
        **({"window": reach[0]} if len(set(reach)) == 1 else {"windows": reach}),
        # Over there the caller marks them, and here too, by global_tokens; what is not marked is not global.
        "n_global": theirs("n_global", 0),
    }


def write(config: LongformerConfig) -> dict[str, Any]:
    """See `Family.write`."""
    insist(config, "longformer", dilation=1, dilations=None)
    n_global = 1 if config.n_global is None else config.n_global
    return write_encoder(config, "longformer", PAD + 1, "gelu") | {
        "architectures": ["LongformerForMaskedLM"],
        "model_type": "longformer",
        "pad_token_id": PAD,
        "attention_window": [2 * config.reach(layer) for layer in range(config.n_layers)],
        # No setting of theirs, but kept: `global_attention_mask` must mark so many first tokens.
        "n_global": n_global,
    }


def note(settings: Mapping[str, Any]) -> str | None:
    """What whoever opens a written model in transformers must know; None where there is nothing."""
    marked = settings.get("n_global") if settings.get("model_type") == "longformer" else None
    if not marked:
        return None
    return (
        f"transformers does not know by itself which tokens are global: the first {marked} of each sequence must be "
        f"marked in `global_attention_mask`, as they were in training."
    )


def table(config: LongformerConfig, theirs: Published) -> Table:
    """See `Family.table`."""
    head = {"transform.0": "lm_head.dense", "transform.2": "lm_head.layer_norm"}
    unused = theirs("pad_token_id", PAD) + 1
    result = encoder_table(config, theirs, "longformer", unused, head, "lm_head.bias", 2)
    for i in range(config.n_layers):
        ours = f"blocks.{i}.mixers.0.global_queries"
        theirs_self = f"longformer.encoder.layer.{i}.attention.self"
        result.links.extend(norm_links({f"{ours}.key": f"{theirs_self}.key_global"}, ["weight"]))
        parts = ("query", "value")
        result.links.extend(norm_links({f"{ours}.{part}": f"{theirs_self}.{part}_global" for part in parts}))
        # It moves all scores of a query alike, which a softmax does not see.
        result.silent[f"{theirs_self}.key_global.bias"] = (config.d_model,)
    return result


FAMILY = Family(
    "longformer", "longformer", read, table, write, model_types=("longformer",), renames=RENAMES, inert=INERT
)
