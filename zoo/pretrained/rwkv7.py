"""RWKV-7: its author's .pth files; transformers has no such architecture of its own."""

from __future__ import annotations

from typing import Any

from zoo.architectures.rwkv7 import RWKV7Config
from zoo.pretrained.convert import CHANNELS, SHARE, TRANSPOSED, Link, Source, Table, link, norm_links
from zoo.pretrained.family import Family, Published
from zoo.pretrained.rwkv4 import count_blocks

MIXES = "rwkvag"
LOW_RANK = {"w": "decay", "a": "rate", "g": "gate", "v": "residual"}


def read(theirs: Published) -> dict[str, Any]:
    """See `Family.read`."""
    vocab, width = theirs.shapes["emb.weight"]
    ranks = {part: theirs.shapes.get(f"blocks.1.att.{letter}1", (0, None))[1] for letter, part in LOW_RANK.items()}
    for letter in "wag":
        ranks[LOW_RANK[letter]] = theirs.shapes[f"blocks.0.att.{letter}1"][1]
    return {
        "vocab_size": vocab,
        "d_model": width,
        "n_layers": count_blocks(theirs),
        "head_dim": theirs.shapes["blocks.0.att.r_k"][1],
        "d_ff": theirs.shapes["blocks.0.ffn.key.weight"][0],
        "embedding_norm": "blocks.0.ln0.weight" in theirs.shapes,
        "decay_rank": ranks["decay"],
        "rate_rank": ranks["rate"],
        "gate_rank": ranks["gate"],
        "value_rank": ranks["residual"],
    }


def table(config: RWKV7Config, theirs: Published) -> Table:
    """See `Family.table`."""
    links = [link("embedding.weight", "emb.weight")]
    if not config.tie_embeddings:
        links.append(link("head.weight", "head.weight"))
    norms = {"norm": "ln_out"}
    if config.embedding_norm:
        norms["embedding_norm"] = "blocks.0.ln0"
    for i in range(config.n_layers):
        ours, att, ffn = f"blocks.{i}.mixers", f"blocks.{i}.att", f"blocks.{i}.ffn"
        norms |= {f"blocks.{i}.norms.0": f"blocks.{i}.ln1", f"blocks.{i}.norms.1": f"blocks.{i}.ln2"}
        links.append(Link(f"{ours}.0.shift.mu", tuple(Source(f"{att}.x_{mix}", SHARE) for mix in MIXES)))
        links.append(link(f"{ours}.1.shift.mu", f"{ffn}.x_k", SHARE))
        for letter, part in LOW_RANK.items():
            if letter == "v" and i == 0:
                continue
            links.append(link(f"{ours}.0.{part}.down", f"{att}.{letter}1", TRANSPOSED))
            links.append(link(f"{ours}.0.{part}.up", f"{att}.{letter}2", TRANSPOSED))
            if letter != "g":
                links.append(link(f"{ours}.0.{part}.bias", f"{att}.{letter}0", CHANNELS))
        links += [link(f"{ours}.0.{name}", f"{att}.{name}", CHANNELS) for name in ("k_k", "k_a")]
        links.append(link(f"{ours}.0.r_k", f"{att}.r_k"))
        names = ("receptance", "key", "value", "output")
        links += [link(f"{ours}.0.{name}.weight", f"{att}.{name}.weight") for name in names]
        links += [link(f"{ours}.0.norm_{kind}", f"{att}.ln_x.{kind}") for kind in ("weight", "bias")]
        links += [link(f"{ours}.1.{name}.weight", f"{ffn}.{name}.weight") for name in ("key", "value")]
    return Table(links + norm_links(norms), {}, {})


PTH = Family(
    "rwkv7 (.pth)",
    "rwkv7",
    read,
    table,
    marks=(r"emb\.weight", r"blocks\.0\.att\.r_k", r"blocks\.0\.att\.w1", r"blocks\.0\.ffn\.x_k"),
    # The first layer's values are what the others mix in: its own residual is never computed.
    inert=(r"blocks\.0\.att\.v[012]",),
)
