"""Attention whose memory of a long text is chosen at evaluation, without touching weights.

Letters: B batch, T time, D d_model, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.kernels.errors import ConfigError, DataError
from zoo.layers.attention import Attention, KVCache
from zoo.settings import Settings


@dataclass(kw_only=True)
class CachePolicy(Settings):
    """What is kept of the keys and values that were read, and how they are seen.

    A policy acts where attention carries a state; a whole sequence at once is read with full attention.
    """

    state: ClassVar[type]
    """The NamedTuple that it keeps; `position` and `start` as in `KVCache`."""

    def init_state(self, attention: CachedAttention, cache: KVCache) -> Any:
        """The state before the first token; `cache` is an empty one of all keys."""
        raise NotImplementedError

    def read(
        self, attention: CachedAttention, q: Tensor, k: Tensor, v: Tensor, state: Any, begins: Tensor
    ) -> tuple[Tensor, Any]:
        """Attends from new tokens to what was kept and to each other.

        Args:
            attention: Whose cache it is.
            q: (B, T, H, K), not yet rotated.
            k: (B, T, G, K), not yet rotated.
            v: (B, T, G, K).
            state: What was kept.
            begins: (B, T) time at which each token's document begins.

        Returns:
            (B, T, H, K), and what is kept now.
        """
        raise NotImplementedError

    def made(self, state: Any) -> bool:
        """Whether a state of the right type can be one of this policy's, with its settings."""
        return True

    def reset_state(self, state: Any, rows: Tensor) -> Any:
        """The state when a new document begins in those rows, (B,) bool."""
        return state._replace(start=torch.where(rows, state.position, state.start))

    def state_size(self, attention: CachedAttention, seq_len: int) -> int:
        """Elements of the state of one sequence after `seq_len` tokens."""
        raise NotImplementedError


class CachedAttention(Attention):
    """Attention that follows a policy where it has one."""

    policy: CachePolicy | None = None

    def forward(
        self, x: Tensor, state: Any = None, segment_ids: Tensor | None = None, shared: dict[str, Any] | None = None
    ) -> tuple[Tensor, Any]:
        """Maps (B, T, D) to (B, T, D); see `Mixer.forward`."""
        if state is None or self.policy is None:
            return super().forward(x, state, segment_ids, shared)
        if not isinstance(state, self.policy.state) or not self.policy.made(state):
            raise DataError(
                f"the state is a {type(state).__name__}, of another model or cache: begin with one from init_state"
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise ConfigError(
                "cache policies have no gradients: read under torch.no_grad(), or set_cache(model, 'full') to train"
            )
        qk, v = self._project(x)
        q, k = qk.split([self.n_heads, self.n_kv_heads], dim=2)
        begins = self._documents(x, state, segment_ids, shared).begins
        assert begins is not None
        y, state = self.policy.read(self, q, k, v, state, begins)
        return self.out_proj(y.flatten(2)), state

    def rotated(self, x: Tensor, places: Tensor, lengths: Tensor | None) -> Tensor:
        """Queries or keys rotated by their places, which may be far; as they are where nothing rotates."""
        return x if self.rotary is None else self.rotary(x, places, lengths, exact=True)

    @property
    def grows(self) -> bool:
        """Whether keys are kept as they were before their rotation; see `Rotary.grows`."""
        return self.rotary is not None and self.rotary.grows

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """Nothing read."""
        cache = super().init_state(batch_size, device=device, dtype=dtype)
        return cache if self.policy is None else self.policy.init_state(self, cache)

    def reset_state(self, state: Any, rows: Tensor) -> Any:
        """Starts a new document in those rows."""
        return super().reset_state(state, rows) if self.policy is None else self.policy.reset_state(state, rows)

    def trim_state(self, state: Any) -> Any:
        """A policy decides itself what it keeps."""
        return super().trim_state(state) if self.policy is None else state

    def state_size(self, seq_len: int) -> int:
        """What the policy keeps, or all."""
        return super().state_size(seq_len) if self.policy is None else self.policy.state_size(self, seq_len)
