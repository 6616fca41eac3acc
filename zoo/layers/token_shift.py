"""Token shift: the local mixing in front of RWKV's projections.

Letters: B batch, T time, D d_model, M mixes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.kernels import token_shift, token_shift_flops
from zoo.mixer import no_weight_decay


class TokenShift(nn.Module):
    """Interpolates each token with the one before it, x + (shift(x) - x) * mu, once per projection that follows.

    Before the first token of a document stands a zero.

    Args:
        init: Initial share mu of the previous token per mix and channel, (M, D).
        enabled: False takes the local mixing out: every mix is x itself, and there is nothing to learn or to remember.
    """

    def __init__(self, init: Tensor, enabled: bool = True) -> None:
        super().__init__()
        self.n_mixes, self.d_model = init.shape
        self.mu = nn.Parameter(init.clone()) if enabled else None
        if self.mu is not None:
            no_weight_decay(self.mu)

    def forward(
        self, x: Tensor, last: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Maps (B, T, D) to M tensors of that shape, and the state to the next (None if none went in)."""
        if self.mu is None:
            return (x,) * self.n_mixes, last
        mixes, final = token_shift(x, self.mu, initial_state=last, segment_ids=segment_ids)
        return mixes, None if last is None else final.to(last.dtype)

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
        """The token before the first, (B, D) zeros; (B, 0) where the shift is off."""
        return torch.zeros(batch_size, self.state_size(), device=device, dtype=dtype)

    def state_size(self) -> int:
        """Elements of one sequence's state."""
        return 0 if self.mu is None else self.d_model

    def flops(self, seq_len: int) -> int:
        """Forward operations of one sequence; none where the shift is off."""
        return 0 if self.mu is None else token_shift_flops(1, seq_len, self.d_model, self.n_mixes)
