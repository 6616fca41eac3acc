"""The shell that every architecture shares: embedding, blocks of residual sublayers, final norm, head.

Letters: B batch, T time, D d_model, V vocab_size.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.config import ModelConfig
from zoo.kernels.errors import ConfigError, DataError
from zoo.mixer import Mixer
from zoo.registry import Architecture, architecture


class ModelState(NamedTuple):
    """What a model remembers of the tokens it has read."""

    layers: tuple[tuple[Any, ...], ...]
    """One state per sublayer of each block."""
    segment: Tensor
    """(B,) int64: the id of the document that each row is in; -1 before any id was seen."""


class ModelOutput(NamedTuple):
    """What a model returns."""

    logits: Tensor
    """(B, T, V)."""
    state: ModelState | None
    """The next state where one went in, else None."""
    losses: dict[str, Tensor]
    """Auxiliary losses by name; the training module adds them to its loss."""


class Block(nn.Module):
    """One block: each sublayer reads the normalised residual stream and adds to it."""

    def __init__(self, sublayers: list[Mixer], config: ModelConfig) -> None:
        super().__init__()
        self.norms = nn.ModuleList(config.make_norm() for _ in sublayers)
        self.mixers = nn.ModuleList(sublayers)

    def forward(
        self, x: Tensor, states: tuple[Any, ...] | None, segment_ids: Tensor | None, shared: dict[str, Tensor]
    ) -> tuple[Tensor, tuple[Any, ...] | None]:
        """Maps (B, T, D) to (B, T, D); `states` holds one state per sublayer, or is None; `shared`: see `Mixer`."""
        next_states = []
        for i, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            more = (shared,) if mixer.shares else ()
            update, next_state = mixer(norm(x), None if states is None else states[i], segment_ids, *more)
            x = x + update
            next_states.append(next_state)
        return x, None if states is None else tuple(next_states)


class Model(nn.Module):
    """A language model around a registered architecture. Build it with `create_model`."""

    def __init__(self, arch: Architecture, config: ModelConfig) -> None:
        super().__init__()
        self.architecture = arch.name
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.embedding_norm = config.make_norm() if config.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(arch.mixer.sublayers(config, layer), config) for layer in range(config.n_layers)
        )
        self.norm = config.make_norm()
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        arch.mixer.init_shell(config, self.embedding, self.head)

    def forward(
        self, tokens: Tensor, state: ModelState | None = None, segment_ids: Tensor | None = None
    ) -> ModelOutput:
        """Predicts the label of each position.

        Args:
            tokens: Token ids, (B, T), T >= 1.
            state: What came before, from `init_state` or an earlier output; None for a whole sequence at once.
            segment_ids: (B, T), non-negative and non-decreasing along T: packed documents, which do not see each
                other. With a state, a row whose first id is not the one it stopped at starts a new document.

        Raises:
            DataError: The tokens or segment ids have a wrong shape or type, or lie outside the vocabulary.
        """
        if not torch.compiler.is_compiling():
            self._check(tokens, state, segment_ids)
        if state is not None and segment_ids is not None:
            state = self._enter_segments(state, segment_ids[:, 0])
        x = self.embedding_norm(self.embedding(tokens))  # (B, T, D)
        shared: dict[str, Tensor] = {}
        next_layers = []
        for i, block in enumerate(self.blocks):
            x, next_states = block(x, None if state is None else state.layers[i], segment_ids, shared)
            next_layers.append(next_states)
        logits = F.linear(self.norm(x), self.embedding.weight if self.head is None else self.head.weight)
        if state is None:
            return ModelOutput(logits, None, {})
        segment = state.segment if segment_ids is None else segment_ids[:, -1]
        return ModelOutput(logits, ModelState(tuple(next_layers), segment), {})

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> ModelState:
        """The state before the first token, on the model's device and in its dtype unless said otherwise."""
        device = device or self.embedding.weight.device
        dtype = dtype or self.embedding.weight.dtype
        layers = tuple(
            tuple(mixer.init_state(batch_size, device=device, dtype=dtype) for mixer in mixers)
            for mixers in self.mixers()
        )
        return ModelState(layers, torch.full((batch_size,), -1, dtype=torch.int64, device=device))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that must not decay: norms, biases, embeddings, and what a mixer marks."""
        exempt: tuple[type[nn.Module], ...] = (nn.Embedding, nn.RMSNorm, nn.LayerNorm, nn.GroupNorm)
        names = set()
        for prefix, module in self.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                marked = getattr(parameter, "_no_weight_decay", False)
                if isinstance(module, exempt) or name.endswith("bias") or marked:
                    names.add(f"{prefix}.{name}" if prefix else name)
        return names

    def learning_rate_scales(self) -> dict[str, float]:
        """Parameters that do not learn at the common rate, as their mixers mark them: name -> factor."""
        return {n: p._learning_rate_scale for n, p in self.named_parameters() if hasattr(p, "_learning_rate_scale")}

    def flops(self, seq_len: int) -> int:
        """Declared forward FLOPs (2 per multiply-add) for one sequence of `seq_len` tokens, head included."""
        blocks = sum(mixer.flops(seq_len) for mixers in self.mixers() for mixer in mixers)
        return blocks + 2 * seq_len * self.config.d_model * self.config.vocab_size

    def state_size(self, seq_len: int) -> int:
        """Declared elements of the state of one sequence after `seq_len` tokens, the document's id included."""
        return 1 + sum(mixer.state_size(seq_len) for mixers in self.mixers() for mixer in mixers)

    def mixers(self) -> list[list[Mixer]]:
        """The residual sublayers of each block, in order."""
        return [cast("list[Mixer]", list(cast(Block, block).mixers)) for block in self.blocks]

    def _enter_segments(self, state: ModelState, segment: Tensor) -> ModelState:
        """Resets the rows whose next token begins another document than the one the state belongs to."""
        rows = (state.segment != segment) & (state.segment >= 0)  # (B,)
        layers = tuple(
            tuple(mixer.reset_state(s, rows) for mixer, s in zip(mixers, states, strict=True))
            for mixers, states in zip(self.mixers(), state.layers, strict=True)
        )
        return ModelState(layers, segment)

    def _check(self, tokens: Tensor, state: ModelState | None, segment_ids: Tensor | None) -> None:
        if tokens.ndim != 2 or tokens.shape[1] == 0 or tokens.dtype not in (torch.int64, torch.int32):
            raise DataError(
                f"tokens of shape {tuple(tokens.shape)} and type {tokens.dtype}: expected integer ids of shape "
                f"(batch, time) with at least one time step"
            )
        if state is not None and state.segment.shape[0] != tokens.shape[0]:
            raise DataError(
                f"the state holds {state.segment.shape[0]} rows and the tokens {tokens.shape[0]}: "
                f"make the state with init_state({tokens.shape[0]})"
            )
        if segment_ids is not None and segment_ids.shape != tokens.shape:
            raise DataError(
                f"segment_ids of shape {tuple(segment_ids.shape)}: expected that of the tokens, {tuple(tokens.shape)}"
            )
        # On a GPU this look would wait for the device at every step; an id out of range asserts there anyway.
        if tokens.device.type == "cpu" and tokens.numel():
            low, high = (int(v) for v in torch.aminmax(tokens))
            if low < 0 or high >= self.config.vocab_size:
                raise DataError(
                    f"token id {low if low < 0 else high} is outside the vocabulary 0..{self.config.vocab_size - 1}: "
                    f"raise vocab_size or mend the data"
                )


def create_model(name: str, **settings: Any) -> Model:
    """Builds a model with fresh weights.

    Args:
        name: A registered architecture; see `list_models`.
        **settings: Fields of the architecture's config, `vocab_size` at least.

    Raises:
        ConfigError: Unknown architecture or setting (near misses are named), or a bad value.
    """
    arch = architecture(name)
    return Model(arch, arch.config.from_dict(settings, owner=f"architecture {name!r}"))


def state_bytes(state: Any) -> int:
    """Bytes of the tensors that a state really holds, views counted with all of the memory they keep alive."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, tuple):
            for item in value:
                visit(item)
        elif value is not None:
            raise ConfigError(f"a state holds tensors and tuples only, not {type(value).__name__}")

    visit(state)
    return sum(storages.values())
