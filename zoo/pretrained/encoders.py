"""What the published encoders of BERT's build share: settings, embeddings, blocks and head.

Letters: D d_model, P positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.errors import ConfigError
from zoo.layers.attention import BERT, AttentionConfig
from zoo.pretrained.convert import SAME, Form, Link, Source, Table, link, norm_links
from zoo.pretrained.family import Published, insist

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
INERT = (
    r".*\.embeddings\.position_ids",
    r".*\.embeddings\.token_type_ids",
    r"cls\.seq_relationship\.(weight|bias)",  # of the next-sentence head
)
RENAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))


def read_encoder(theirs: Published, activation: str, mlm_activation: str | None) -> dict[str, Any]:
    """Our settings from theirs, positions left out.

    Args:
        theirs: Theirs.
        activation: Their default.
        mlm_activation: That of the head; None: as in the blocks.
    """
    theirs.only("position_embedding_type", "absolute")
    theirs.only("is_decoder", False)
    kind = theirs.only("hidden_act", activation, *ACTIVATIONS)
    return BERT | {
        "vocab_size": theirs("vocab_size"),
        "d_model": theirs("hidden_size"),
        "n_layers": theirs("num_hidden_layers"),
        "n_heads": theirs("num_attention_heads"),
        "d_ff": theirs("intermediate_size"),
        "norm_eps": theirs("layer_norm_eps", 1e-12),
        "tie_embeddings": theirs("tie_word_embeddings", True),
        "feed_forward": ACTIVATIONS[kind],
        "mlm_head": mlm_activation or ACTIVATIONS[kind],
    }


def write_encoder(config: AttentionConfig, form: str, unused: int, mlm_activation: str | None) -> dict[str, Any]:
    """Their settings from ours.

    Args:
        config: Ours.
        form: What theirs is called.
        unused: Rows of the positions before the first.
        mlm_activation: That of the head; None: as in the blocks.
    """
    shell = {key: BERT[key] for key in ("causal", "norm", "post_norm", "embedding_norm", "rotary", "bias")}
    insist(config, form, **shell, n_kv_heads=None, qkv_bias=None)
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    if config.max_positions is None or config.feed_forward not in names:
        raise ConfigError(
            f"max_positions={config.max_positions} and feed_forward={config.feed_forward!r}: the {form} of "
            f'transformers has learned positions and gelu; save with format="zoo"'
        )
    insist(config, form, mlm_head=mlm_activation or config.feed_forward)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_ff or 4 * config.d_model,
        "hidden_act": names[config.feed_forward],
        "layer_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions + unused,
        "tie_word_embeddings": config.tie_embeddings,
        "type_vocab_size": 1,
        # None of our models has dropout inside.
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def without_first(rows: int) -> Form:
    """(rows + P, D) and (P, D): the first rows belong to no position."""

    def save(positions: Tensor) -> Tensor:
        return F.pad(positions, (0, 0, rows, 0))

    return Form(lambda t: t[rows:], save)


def first_type(count: int) -> Form:
    """(count, D), the embeddings of token types: type 0, (D,), belongs to every position of ours."""
    return Form(lambda t: t[0], lambda positions: positions.new_zeros(count, positions.shape[1]))


def encoder_table(
    config: AttentionConfig, theirs: Published, model: str, unused: int, head: Mapping[str, str], bias: str, types: int
) -> Table:
    """The tensors of an encoder.

    Args:
        config: Ours.
        theirs: Their settings.
        model: Prefix of their names.
        unused: Rows of the positions before the first.
        head: Modules of the head, ours -> theirs.
        bias: The bias of the logits.
        types: How many token types there are where the settings are silent.
    """
    embeddings = f"{model}.embeddings"
    positions = Source(f"{embeddings}.position_embeddings.weight", without_first(unused) if unused else SAME)
    kinds = Source(f"{embeddings}.token_type_embeddings.weight", first_type(theirs("type_vocab_size", types)))
    words, decoder = f"{embeddings}.word_embeddings.weight", bias.rpartition(".")[0] + ".decoder"
    links = [link("embedding.weight", words), Link("positions.weight", (positions,), kinds)]
    if config.tie_embeddings:
        links.append(link("head_bias", bias))
        table = Table(links, {f"{decoder}.bias": bias, f"{decoder}.weight": words}, {})
    else:  # then nothing ties the two biases either, and the decoder reads its own
        links += [link("head.weight", f"{decoder}.weight"), link("head_bias", f"{decoder}.bias")]
        table = Table(links, {}, {bias: (config.vocab_size,)})
    links += norm_links({"embedding_norm": f"{embeddings}.LayerNorm", **head})
    for i in range(config.n_layers):
        ours, layer = f"blocks.{i}", f"{model}.encoder.layer.{i}"
        for kind in ("weight", "bias"):
            parts = (Source(f"{layer}.attention.self.{part}.{kind}") for part in ("query", "key", "value"))
            links.append(Link(f"{ours}.mixers.0.qkv_proj.{kind}", tuple(parts)))
        modules = {
            f"{ours}.mixers.0.out_proj": f"{layer}.attention.output.dense",
            f"{ours}.norms.0": f"{layer}.attention.output.LayerNorm",
            f"{ours}.mixers.1.up_proj": f"{layer}.intermediate.dense",
            f"{ours}.mixers.1.down_proj": f"{layer}.output.dense",
            f"{ours}.norms.1": f"{layer}.output.LayerNorm",
        }
        links += norm_links(modules)
    return table
