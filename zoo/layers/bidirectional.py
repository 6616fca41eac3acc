"""Both ways for a mixer that reads one way: forward plus reversed (Schuster and Paliwal 1997, doi 10.1109/78.650093).

Letters: B batch, T time, D d_model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zoo.config import ModelConfig
from zoo.mixer import Mixer


class Bidirectional(Mixer):
    """The sum of two mixers with weights of their own, one of which reads the sequence from its end.

    Args:
        config: The model's config.
        layer: Number of the block.
        onward: Reads from the beginning.
        backward: Reads from the end.
    """

    both_ways = True

    def __init__(self, config: ModelConfig, layer: int, onward: Mixer, backward: Mixer) -> None:
        super().__init__(config, layer)
        self.onward = onward
        self.backward = backward
        self.shares = onward.shares

    def forward(
        self,
        x: Tensor,
        state: None = None,
        segment_ids: Tensor | None = None,
        shared: dict[str, Any] | None = None,
    ) -> tuple[Tensor, None]:
        """Maps (B, T, D) to (B, T, D); there is no state."""
        reversed_ids = None
        if segment_ids is not None:  # non-decreasing again
            reversed_ids = segment_ids[:, -1:] - segment_ids.flip(1)
        more: tuple[tuple[Any, ...], tuple[Any, ...]] = ((), ())
        if shared is not None:  # what layers leave for each other is in the order of time that they read in
            if "reversed" not in shared:  # but losses add up
                shared["reversed"] = {"losses": shared["losses"]} if "losses" in shared else {}
            if "diagnostics" in shared:
                shared["reversed"]["diagnostics"] = {}
            more = (shared,), (shared["reversed"],)
        y, _ = self.onward(x, None, segment_ids, *more[0])
        z, _ = self.backward(x.flip(1), None, reversed_ids, *more[1])
        if shared is not None and "diagnostics" in shared:
            shown = shared["reversed"]["diagnostics"].items()
            shared["diagnostics"] |= {f"reversed/{name}": value for name, value in shown}
        return y + z.flip(1), None

    def flops(self, seq_len: int) -> int:
        """Those of both."""
        return self.onward.flops(seq_len) + self.backward.flops(seq_len)
