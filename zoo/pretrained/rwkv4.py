"""RWKV-4: the layout of transformers, and that of its author's .pth files, which differs in names alone."""

from __future__ import annotations

import re
from typing import Any

from zoo.layers.rwkv import RWKVConfig
from zoo.pretrained.convert import KEPT, Link, Source, Table, link, norm_links
from zoo.pretrained.family import Family, Published, insist

RENAMES = (
    (r"^emb\.", "rwkv.embeddings."),
    (r"^ln_out\.", "rwkv.ln_out."),
    (r"^blocks\.0\.ln0\.", "rwkv.blocks.0.pre_ln."),
    (r"^blocks\.(\d+)\.ln", r"rwkv.blocks.\1.ln"),
    (r"^blocks\.(\d+)\.att\.", r"rwkv.blocks.\1.attention."),
    (r"^blocks\.(\d+)\.ffn\.", r"rwkv.blocks.\1.feed_forward."),
    (r"\.time_mix_k$", ".time_mix_key"),
    (r"\.time_mix_v$", ".time_mix_value"),
    (r"\.time_mix_r$", ".time_mix_receptance"),
)


def read(theirs: Published) -> dict[str, Any]:
    """See `Family.read`."""
    width = theirs("hidden_size")
    theirs.only("attention_hidden_size", width, None)
    return {
        "vocab_size": theirs("vocab_size"),
        "d_model": width,
        "n_layers": theirs("num_hidden_layers"),
        "d_ff": theirs("intermediate_size", None),
        "norm_eps": theirs.only("layer_norm_epsilon", 1e-5),  # the last norm over there knows no other
        "tie_embeddings": theirs("tie_word_embeddings", False),
    }


def read_shapes(theirs: Published) -> dict[str, Any]:
    """Settings of a .pth file, from the shapes of its tensors."""
    vocab, width = theirs.shapes["emb.weight"]
    return {
        "vocab_size": vocab,
        "d_model": width,
        "n_layers": count_blocks(theirs),
        "d_ff": theirs.shapes["blocks.0.ffn.key.weight"][0],
        "embedding_norm": "blocks.0.ln0.weight" in theirs.shapes,
    }


def count_blocks(theirs: Published) -> int:
    """How many blocks the names of the tensors speak of."""
    return 1 + max(int(found[1]) for name in theirs.shapes if (found := re.match(r"blocks\.(\d+)\.", name)))


def write(config: RWKVConfig) -> dict[str, Any]:
    """See `Family.write`."""
    shell = {"norm": "layer", "embedding_norm": True, "post_norm": False, "max_positions": None, "mlm_head": None}
    insist(config, "rwkv", **shell, norm_eps=1e-5, causal=True, token_shift=True)
    return {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "attention_hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "intermediate_size": config.d_ff or 4 * config.d_model,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


def table(config: RWKVConfig, theirs: Published) -> Table:
    """See `Family.table`."""
    links = [link("embedding.weight", "rwkv.embeddings.weight")]
    if not config.tie_embeddings:
        links.append(link("head.weight", "head.weight"))
    norms = {"norm": "rwkv.ln_out"}
    if config.embedding_norm:
        norms["embedding_norm"] = "rwkv.blocks.0.pre_ln"
    for i in range(config.n_layers):
        ours, layer = f"blocks.{i}", f"rwkv.blocks.{i}"
        norms |= {f"{ours}.norms.0": f"{layer}.ln1", f"{ours}.norms.1": f"{layer}.ln2"}
        for n, part, mixes in (
            (0, "attention", ("key", "value", "receptance")),
            (1, "feed_forward", ("key", "receptance")),
        ):
            mixer, theirs_mixer = f"{ours}.mixers.{n}", f"{layer}.{part}"
            shares = tuple(Source(f"{theirs_mixer}.time_mix_{mix}", KEPT) for mix in mixes)
            links.append(Link(f"{mixer}.shift.mu", shares))
            projections = ("key", "value", "receptance", "output") if n == 0 else ("key", "value", "receptance")
            links += [link(f"{mixer}.{name}.weight", f"{theirs_mixer}.{name}.weight") for name in projections]
        for name in ("time_decay", "time_first"):
            links.append(link(f"{ours}.mixers.0.{name}", f"{layer}.attention.{name}"))
    copies = {"head.weight": "rwkv.embeddings.weight"} if config.tie_embeddings else {}
    return Table(links + norm_links(norms), copies, {})


FAMILY = Family("rwkv4", "rwkv4", read, table, write, model_types=("rwkv",))
PTH = Family(
    "rwkv4 (.pth)",
    "rwkv4",
    read_shapes,
    table,
    renames=RENAMES,
    marks=(r"emb\.weight", r"blocks\.0\.att\.time_first", r"blocks\.0\.att\.time_mix_k", r"blocks\.0\.ffn\.time_mix_r"),
)
