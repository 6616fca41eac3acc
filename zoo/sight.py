"""What attention really sees: a layer is asked by inputs from which every output tells the keys that went into it.

Letters: B batch, T time, D d_model, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.architectures.longformer import GlobalQueries
from zoo.config import ModelConfig
from zoo.documents import document_begins, document_ends
from zoo.layers.attention import Attention
from zoo.registry import Architecture

UNSEEN, NEAR, GLOBAL_KEY, GLOBAL_QUERY, RANDOM, REPEATED = range(6)
"""What a pair of a query and a key is, in the order of what hides what."""


@dataclass(frozen=True)
class Sight:
    """What the queries of one attention layer see."""

    layer: int
    """Number of its block."""
    weights: Tensor
    """(H, T, T) how often the softmax of each query (second) counts each key (third); 0: not seen."""
    kinds: Tensor
    """(H, T, T) int64: what each pair is, `NEAR` and so on."""
    kept: int | None
    """Keys per key/value head in the decoding state after T tokens; None: there is no state."""
    block: int
    """`Attention.block`."""

    def is_full(self) -> bool:
        """Whether there is nothing sparse about it."""
        return bool((self.kinds <= NEAR).all()) and self.share(0) == 1

    def share(self, head: int) -> float:
        """Pairs that are seen, over those of full attention in the same direction."""
        length = self.weights.shape[-1]
        return int((self.weights[head] > 0).sum()) / (length**2 if self.kept is None else length * (length + 1) // 2)

    def reach(self, head: int) -> tuple[int, int]:
        """How far back, and how far ahead, the near keys stand."""
        query, key = (self.kinds[head] == NEAR).nonzero().unbind(-1)
        distance = torch.cat((query - key, query.new_zeros(1)))
        return int(distance.max()), int(-distance.min())

    def distinct_heads(self) -> list[list[int]]:
        """The heads, those that see the same together."""
        groups: list[list[int]] = []
        for head, weights in enumerate(self.weights):
            for group in groups:
                if torch.equal(weights, self.weights[group[0]]):
                    group.append(head)
                    break
            else:
                groups.append([head])
        return groups


def look(
    arch: Architecture,
    config: ModelConfig,
    layer: int,
    length: int,
    documents: Sequence[int] | None = None,
    *,
    training: bool = False,
) -> Sight | None:
    """What the attention of one block sees.

    Args:
        arch: A registered architecture.
        config: Its settings.
        layer: Number of the block.
        length: T.
        documents: Lengths of packed documents, T in all; None: one document.
        training: As in training, where that differs.

    Returns:
        None where the block has no attention.

    Raises:
        DataError: The architecture does not take packed documents.
    """
    attention = attention_of(arch, config, layer)
    if attention is None:
        return None
    lengths = torch.tensor(documents or [length])
    segment_ids = torch.arange(len(lengths)).repeat_interleave(lengths)[None]  # (1, T)
    weights, kept = probe(attention.train(training), length, segment_ids if documents else None)

    begins, ends = document_begins(segment_ids)[0], document_ends(segment_ids)[0]  # (T,)
    place, size = torch.arange(length) - begins, ends - begins
    is_global = attention.is_global(place, size)  # (T,)
    near = attention.is_near(place[:, None], place, size[:, None])  # (T, T)
    kinds = torch.where(near, NEAR, RANDOM).expand_as(weights).clone()
    kinds[:, :, is_global] = GLOBAL_KEY
    if not attention.causal:
        kinds[:, is_global] = GLOBAL_QUERY
    kinds[weights > 1] = REPEATED
    kinds[weights == 0] = UNSEEN
    return Sight(layer, weights, kinds, kept, attention.block)


def attention_of(arch: Architecture, config: ModelConfig, layer: int) -> Attention | None:
    """The attention of a block, with fresh weights; None where it has none."""
    sublayers = arch.mixer.sublayers(config, layer)
    return next((mixer for mixer in sublayers if isinstance(mixer, Attention)), None)


@torch.no_grad()
def probe(attention: Attention, length: int, segment_ids: Tensor | None) -> tuple[Tensor, int | None]:
    """Asks a layer what its queries see. Its weights are lost.

    Queries and keys are zero, so that all that is seen gets the same share. K tokens at a time have values, each a 1
    at a place of its own, so that what a query draws are the shares of these.

    Args:
        attention: The layer.
        length: T.
        segment_ids: (1, T), or None.

    Returns:
        How often each key counts, (H, T, T), and how many keys the state keeps, None if there is no state.
    """
    width = attention.head_dim
    for parameter in attention.parameters():
        parameter.zero_()
    projections = [attention.qkv_proj.weight[-attention.n_kv_heads * width :]]
    projections += [module.value.weight for module in attention.modules() if isinstance(module, GlobalQueries)]
    for weight in projections:  # (G K, D) or (H K, D): each head gets the first K of D
        weight.copy_(torch.eye(width, weight.shape[1]).repeat(weight.shape[0] // width, 1))
    nn.init.eye_(attention.out_proj.weight)

    times = torch.arange(length)
    rows = -(-length // width)
    x = torch.zeros(rows, length, attention.qkv_proj.in_features)  # (B, T, D)
    x[times // width, times, times % width] = 1
    if segment_ids is not None:
        segment_ids = segment_ids.expand(rows, -1)
    drawn = attention(x, None, segment_ids)[0].unflatten(-1, (-1, width))  # (B, T, H, K)
    shares = drawn.permute(2, 1, 0, 3).flatten(2)[..., :length]  # (H, T, T)
    weights = (shares / torch.where(shares > 0, shares, 1.0).amin(-1, keepdim=True)).round()
    if not attention.causal:
        return weights, None
    state = attention(x, attention.init_state(rows), segment_ids)[1]
    return weights, sum(part.shape[1] for part in state if part.ndim == 4) // 2  # (B, S, G, K), keys and values
