"""The contract of everything that sits inside a block: one `forward` for training, prefill and decoding.

Letters: B batch, T time, D d_model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.config import ModelConfig


class NoState(NamedTuple):
    """The state of a mixer that remembers nothing, such as a feed-forward."""


class Wrapper(nn.Module):
    """What an architecture has around its blocks where they read more tokens than the model does (`landmark`)."""

    strict = False
    """Whether mixers of other architectures stand in the blocks too, to which its tokens are like all others."""

    def insert(
        self, x: Tensor, positions: Tensor, segment_ids: Tensor | None, shared: dict[str, Any], *, carried: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What the blocks read.

        Args:
            x: The embedded tokens, (B, T, D).
            positions: Place of each token in its document, (B, T).
            segment_ids: (B, T), packed documents, or None.
            shared: See `Mixer.shares`.
            carried: Whether there is a state.

        Returns:
            (B, T', D), and segment ids (B, T') where there were any.
        """
        raise NotImplementedError

    def remove(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        """What the blocks made of the model's own tokens: (B, T', D) to (B, T, D)."""
        raise NotImplementedError

    def length(self, seq_len: int) -> int:
        """How many tokens the blocks read of a sequence of `seq_len`."""
        raise NotImplementedError


class Mixer(nn.Module):
    """A residual sublayer: mixes information along time (attention, a recurrence) or along channels (a feed-forward).

    A subclass sets up its parameters, initialisation included, in `__init__(config, layer)` and overrides what is
    below. A mixer without a state only needs `forward` and `flops`.

    A state is a NamedTuple of tensors whose first dimension is the batch; the shell never looks inside.
    """

    @classmethod
    def sublayers(cls, config: Any, layer: int) -> list[Mixer]:
        """The residual sublayers of block number `layer`, in order. By default the mixer alone."""
        return [cls(config, layer)]

    @classmethod
    def init_shell(cls, config: Any, embedding: nn.Embedding, head: nn.Linear | None) -> None:
        """Initialises the embedding and the head (None where they are tied). By default N(0, 0.02^2)."""
        nn.init.normal_(embedding.weight, std=0.02)
        if head is not None:
            nn.init.normal_(head.weight, std=0.02)

    @classmethod
    def make_wrapper(cls, config: Any) -> Wrapper | None:
        """What stands around the blocks; by default nothing."""
        return None

    learning_rate_factor = 1.0
    """The learning rate that suits the architecture over the one a dataset recommends; used where none is given."""

    shares = False
    """Whether `forward` takes a fourth argument, `shared`: a dict that lives for one call of the model, in which a
    layer leaves values of the same tokens for the layers above it (RWKV-7: the values of its first layer).

    Two entries of it are what leaves the model, and are there only if somebody asks:
    `shared["losses"]`, where gradients are recorded: auxiliary losses; add one with `add_loss`.
    `shared["diagnostics"]`, under `Model.diagnose`: what the mixer wants to show, tensors by "name/<layer>"."""

    both_ways = False
    """Whether the mixer itself looks both ways where `config.causal` is false, or mixes nothing along time. The shell
    runs others twice, forward and on the reversed sequence, each with its own weights, and adds the results."""

    global_tokens = False
    """Whether `shared["global_tokens"]`, (B, T) bool, tells this mixer which tokens all others see (Longformer)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, state: Any = None, segment_ids: Tensor | None = None) -> tuple[Tensor, Any]:
        """Maps the normalised residual stream to the update of this sublayer.

        Args:
            x: Input, (B, T, D).
            state: None: the whole sequence at once, and None comes back. Otherwise continue after what the state has
                seen; T may be 1, a chunk or a training segment, and gradients flow into an incoming state.
            segment_ids: (B, T), packed documents: a token sees no token with another id, and the state that comes out
                belongs to the last document of each row. The incoming state belongs to the row's first document
                (the shell has reset it where it does not).

        Returns:
            The update, (B, T, D), and the next state (None if none went in).
        """
        raise NotImplementedError

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """The state before the first token. `dtype` is that of cached activations; recurrent states are fp32."""
        return NoState()

    def reset_state(self, state: Any, rows: Tensor) -> Any:
        """The state with those batch rows (bool, (B,)) as before the first token.

        This default serves states of constant size; one that grows overrides it.
        """
        if not state:
            return state
        fresh = self.init_state(rows.shape[0], device=state[0].device, dtype=state[0].dtype)
        pairs = zip(state, fresh, strict=True)
        return type(state)(*(torch.where(_rows_like(rows, old), new, old) for old, new in pairs))

    def trim_state(self, state: Any) -> Any:
        """The state without what the document of no row can see any more; as it is, unless it grows with the text."""
        return state

    def flops(self, seq_len: int) -> int:
        """Forward FLOPs (2 per multiply-add) for one sequence of that length, norms and activations left out."""
        raise NotImplementedError

    def state_size(self, seq_len: int) -> int:
        """Elements of the state of one sequence after `seq_len` tokens; independent of it where memory is constant."""
        return 0


def add_loss(shared: dict[str, Any], name: str, value: Tensor) -> None:
    """Adds a scalar to the auxiliary loss of that name, which is the sum over the layers."""
    losses = shared["losses"]
    losses[name] = losses[name] + value if name in losses else value


def _rows_like(rows: Tensor, other: Tensor) -> Tensor:
    return rows.view(-1, *(1 for _ in other.shape[1:]))  # (B, 1, ...)


def no_weight_decay(*parameters: nn.Parameter) -> None:
    """Marks parameters that weight decay would harm; the optimiser groups honour the mark."""
    for parameter in parameters:
        parameter._no_weight_decay = True  # type: ignore[attr-defined]


def scale_learning_rate(factor: float, *parameters: nn.Parameter) -> None:
    """Marks parameters that learn at `factor` times the learning rate; the optimiser groups honour the mark."""
    for parameter in parameters:
        parameter._learning_rate_scale = factor  # type: ignore[attr-defined]


def taught_apart(*parameters: nn.Parameter) -> None:
    """Marks parameters that auxiliary losses alone teach: the trainer clips their gradient by a norm of its own.

    In one norm with the others, the size of an auxiliary loss would change what the rest of the model learns.
    """
    for parameter in parameters:
        parameter._taught_apart = True  # type: ignore[attr-defined]
