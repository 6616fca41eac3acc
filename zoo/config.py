"""The configuration that every architecture shares: what the shell around the mixers needs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from zoo.settings import Settings, setting


@dataclass(kw_only=True)
class ModelConfig(Settings):
    """Base of each architecture's config. Subclasses add the settings of their mixer as flat fields."""

    vocab_size: int = setting(help="number of token ids; the data decide it in training", minimum=1)
    d_model: int = setting(128, "width of the residual stream", minimum=1)
    n_layers: int = setting(2, "number of blocks", minimum=1)
    tie_embeddings: bool = setting(True, "the head shares the embedding's weights")
    norm: str = setting("rms", "norms of the shell: rms (RMSNorm) or layer (LayerNorm)", choices=("rms", "layer"))
    norm_eps: float = setting(1e-5, "epsilon inside every norm of the shell", above=0)
    embedding_norm: bool = setting(False, "one more norm, straight after the embedding")
    post_norm: bool = setting(False, "norms after each residual addition, as in BERT, not before each sublayer")
    max_positions: int | None = setting(
        None, "learned positions of documents of up to so many tokens, added to the embedding; null: none", minimum=1
    )
    mlm_head: str | None = setting(
        None,
        "BERT's head (dense layer, activation, norm, and a bias on the logits) with gelu or gelu_tanh; null: plain",
        choices=("gelu", "gelu_tanh"),
    )
    causal: bool = setting(True, "a token sees what came before it; false: both sides, for masked and classify")

    def make_norm(self) -> nn.Module:
        """A new norm over the residual stream."""
        kind = nn.RMSNorm if self.norm == "rms" else nn.LayerNorm
        return kind(self.d_model, eps=self.norm_eps)
