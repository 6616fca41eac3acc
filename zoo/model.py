"""The shell that every architecture shares: embedding, blocks of residual sublayers, final norm, head.

Letters: B batch, T time, D d_model, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from zoo.config import ModelConfig
from zoo.documents import document_begins
from zoo.kernels import linear
from zoo.kernels.errors import ConfigError, DataError
from zoo.layers.bidirectional import Bidirectional
from zoo.layers.linear import Linear
from zoo.mixer import Mixer
from zoo.registry import Architecture, architecture


class ModelState(NamedTuple):
    """What a model remembers of the tokens it has read."""

    layers: tuple[tuple[Any, ...], ...]
    """One state per sublayer of each block."""
    segment: Tensor
    """(B,) int64: the id of the document that each row is in; -1 before any id was seen."""
    position: Tensor
    """(B,) int64: how many tokens of that document were read."""


class ModelOutput(NamedTuple):
    """What a model returns."""

    logits: Tensor
    """(B, T, V)."""
    state: ModelState | None
    """The next state where one went in, else None."""
    losses: dict[str, Tensor]
    """Auxiliary losses by name, where gradients are recorded; the training module adds them to its loss."""


class Block(nn.Module):
    """One block: each sublayer reads the normalised residual stream and adds to it; or the sum is normalised."""

    def __init__(self, sublayers: list[Mixer], config: ModelConfig) -> None:
        super().__init__()
        self.post_norm = config.post_norm
        self.norms = nn.ModuleList(config.make_norm() for _ in sublayers)
        self.mixers = nn.ModuleList(sublayers)

    def forward(
        self, x: Tensor, states: tuple[Any, ...] | None, segment_ids: Tensor | None, shared: dict[str, Any]
    ) -> tuple[Tensor, tuple[Any, ...] | None]:
        """Maps (B, T, D) to (B, T, D); `states` holds one state per sublayer, or is None; `shared`: see `Mixer`."""
        next_states = []
        for i, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            more = (shared,) if mixer.shares else ()
            read = x if self.post_norm else norm(x)
            update, next_state = mixer(read, None if states is None else states[i], segment_ids, *more)
            x = norm(x + update) if self.post_norm else x + update
            next_states.append(next_state)
        return x, None if states is None else tuple(next_states)


class Transform(nn.Sequential):
    """What BERT has between the last block and the head: a dense layer, an activation and a norm."""

    def __init__(self, config: ModelConfig, activation: str) -> None:
        dense = Linear(config.d_model, config.d_model)
        nn.init.normal_(dense.weight, std=0.02)
        nn.init.zeros_(dense.bias)
        super().__init__(dense, nn.GELU("tanh" if activation == "gelu_tanh" else "none"), config.make_norm())


class Model(nn.Module):
    """A language model around a registered architecture. Build it with `create_model`."""

    def __init__(self, arch: Architecture, config: ModelConfig) -> None:
        super().__init__()
        self.architecture = arch.name
        self.config = config
        self.tokenizer: dict[str, str] | None = None
        """How text becomes its tokens, as `Codec.to_dict` says it; known of loaded models, and saved with them."""
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = None if config.max_positions is None else nn.Embedding(config.max_positions, config.d_model)
        self.embedding_norm = config.make_norm() if config.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(_sublayers(arch, config, layer), config) for layer in range(config.n_layers))
        self.wrapper = arch.mixer.make_wrapper(config)
        self.norm = nn.Identity() if config.post_norm else config.make_norm()
        self.transform = None if config.mlm_head is None else Transform(config, config.mlm_head)
        self.head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size, bias=False)
        self.head_bias = None if config.mlm_head is None else nn.Parameter(torch.zeros(config.vocab_size))
        arch.mixer.init_shell(config, self.embedding, self.head)
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=0.02)

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        segment_ids: Tensor | None = None,
        global_tokens: Tensor | None = None,
    ) -> ModelOutput:
        """Predicts the label of each position.

        Args:
            tokens: Token ids, (B, T), T >= 1.
            state: What came before, from `init_state` or an earlier output; None for a whole sequence at once.
            segment_ids: (B, T), non-negative and non-decreasing along T: packed documents, which do not see each
                other. With a state, a row whose first id is not the one it stopped at starts a new document.
            global_tokens: (B, T) bool: the tokens that see and are seen by their whole document, for architectures
                that know such tokens (`longformer` with causal=false).

        Raises:
            DataError: The tokens or segment ids have a wrong shape or type, or lie outside the vocabulary; there are
                more tokens than learned positions; the architecture knows no global tokens.
            ConfigError: There is a state, and the model looks both ways.
        """
        losses: dict[str, Tensor] = {}
        wanted = {"losses": losses} if torch.is_grad_enabled() else {}
        x, next_state = self._run(tokens, state, segment_ids, global_tokens, wanted)
        return ModelOutput(self.predict(x), next_state, losses)

    def read(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        segment_ids: Tensor | None = None,
        global_tokens: Tensor | None = None,
    ) -> tuple[Tensor, ModelState | None]:
        """What `forward` computes before the head, (B, T, D), and the next state; arguments and errors are the same.

        For callers that want few of the logits, or not all of them at once: see `predict`. Auxiliary losses are
        not made.
        """
        return self._run(tokens, state, segment_ids, global_tokens, {})

    @torch.no_grad()
    def diagnose(
        self, tokens: Tensor, *, segment_ids: Tensor | None = None, state: ModelState | None = None
    ) -> dict[str, Tensor]:
        """What the layers show of themselves while they read; arguments and errors as in `forward`.

        Returns:
            Tensors by "name/<layer>", which the architecture's mixer describes; nothing where it has nothing to show.
        """
        diagnostics: dict[str, Tensor] = {}
        self._run(tokens, state, segment_ids, None, {"diagnostics": diagnostics})
        return diagnostics

    def _run(
        self,
        tokens: Tensor,
        state: ModelState | None,
        segment_ids: Tensor | None,
        global_tokens: Tensor | None,
        shared: dict[str, Any],
    ) -> tuple[Tensor, ModelState | None]:
        """See `read`; `shared` is what the layers share from the start, see `Mixer.shares`."""
        if not torch.compiler.is_compiling():
            self._check(tokens, state, segment_ids, global_tokens)
        if state is not None and segment_ids is not None:
            state = self._enter_segments(state, segment_ids[:, 0])
        x = self.embedding(tokens)  # (B, T, D)
        counted = self.positions is not None or self.wrapper is not None or state is not None
        positions = _positions(tokens, state, segment_ids) if counted else None
        if self.positions is not None and positions is not None:
            self._check_positions(positions)
            x = x + self.positions(positions)
        x = self.embedding_norm(x)
        if global_tokens is not None:
            shared["global_tokens"] = global_tokens
        ids = segment_ids
        if self.wrapper is not None and positions is not None:
            x, ids = self.wrapper.insert(x, positions, segment_ids, shared, carried=state is not None)
        next_layers = []
        for i, block in enumerate(self.blocks):
            x, next_states = block(x, None if state is None else state.layers[i], ids, shared)
            next_layers.append(next_states)
        if self.wrapper is not None:
            x = self.wrapper.remove(x, shared)
        x = self.norm(x)
        if state is None or positions is None:
            return x, None
        segment = state.segment if segment_ids is None else segment_ids[:, -1]
        return x, ModelState(tuple(next_layers), segment, positions[:, -1] + 1)

    def predict(self, x: Tensor) -> Tensor:
        """The logits, (..., V), of what `read` returned, (..., D)."""
        if self.transform is not None:
            x = self.transform(x)
        return linear(x, self.embedding.weight if self.head is None else self.head.weight, self.head_bias)

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> ModelState:
        """The state before the first token, on the model's device and in its dtype unless said otherwise.

        Raises:
            ConfigError: The model looks both ways, so what it has read it must read again.
        """
        self._check_causal()
        device = device or self.embedding.weight.device
        dtype = dtype or self.embedding.weight.dtype
        layers = tuple(
            tuple(mixer.init_state(batch_size, device=device, dtype=dtype) for mixer in mixers)
            for mixers in self.mixers()
        )
        none_read = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return ModelState(layers, none_read - 1, none_read)

    def trim_state(self, state: ModelState) -> ModelState:
        """The state without what no row's document can see any more: over a text of many documents, memory is bounded.

        Takes nothing away that a later output depends on.
        """
        return state._replace(layers=self._each(state, lambda mixer, held: mixer.trim_state(held)))

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
        read = self._read_length(seq_len)
        blocks = sum(mixer.flops(read) for mixers in self.mixers() for mixer in mixers)
        transform = 0 if self.transform is None else 2 * seq_len * self.config.d_model**2
        return blocks + transform + 2 * seq_len * self.config.d_model * self.config.vocab_size

    def state_size(self, seq_len: int) -> int:
        """Declared elements of the state of one sequence after `seq_len` tokens, two numbers of the shell included."""
        if not self.config.causal:
            return 0
        read = self._read_length(seq_len)
        return 2 + sum(mixer.state_size(read) for mixers in self.mixers() for mixer in mixers)

    def mixers(self) -> list[list[Mixer]]:
        """The residual sublayers of each block, in order."""
        return [cast("list[Mixer]", list(cast(Block, block).mixers)) for block in self.blocks]

    def _read_length(self, seq_len: int) -> int:
        return seq_len if self.wrapper is None else self.wrapper.length(seq_len)

    def _enter_segments(self, state: ModelState, segment: Tensor) -> ModelState:
        """Resets the rows whose next token begins another document than the one the state belongs to."""
        rows = (state.segment != segment) & (state.segment >= 0)  # (B,)
        layers = self._each(state, lambda mixer, held: mixer.reset_state(held, rows))
        return ModelState(layers, segment, torch.where(rows, 0, state.position))

    def _each(self, state: ModelState, change: Callable[[Mixer, Any], Any]) -> tuple[tuple[Any, ...], ...]:
        """The layers of a state, what each mixer holds changed."""
        return tuple(
            tuple(change(mixer, held) for mixer, held in zip(mixers, states, strict=True))
            for mixers, states in zip(self.mixers(), state.layers, strict=True)
        )

    def _check_causal(self) -> None:
        if not self.config.causal:
            raise ConfigError(
                f"this {self.architecture} has causal=false and so no state: give it whole sequences, or build it "
                f"with causal=true to generate"
            )

    def _check_positions(self, positions: Tensor) -> None:
        # Outside a compiler, and on the CPU: a GPU asserts by itself, and a look at it would wait.
        if torch.compiler.is_compiling() or positions.device.type != "cpu":
            return
        longest, known = int(positions.max()) + 1, self.config.max_positions
        if known is not None and longest > known:
            raise DataError(
                f"a document of {longest} tokens is longer than max_positions={known}: give shorter ones, or build the "
                f"model with as many positions"
            )

    def _check(
        self, tokens: Tensor, state: ModelState | None, segment_ids: Tensor | None, global_tokens: Tensor | None
    ) -> None:
        if tokens.ndim != 2 or tokens.shape[1] == 0 or tokens.dtype not in (torch.int64, torch.int32):
            raise DataError(
                f"tokens of shape {tuple(tokens.shape)} and type {tokens.dtype}: expected integer ids of shape "
                f"(batch, time) with at least one time step"
            )
        if state is not None:
            self._check_causal()
            if state.segment.shape[0] != tokens.shape[0]:
                raise DataError(
                    f"the state holds {state.segment.shape[0]} rows and the tokens {tokens.shape[0]}: "
                    f"make the state with init_state({tokens.shape[0]})"
                )
        if segment_ids is not None and segment_ids.shape != tokens.shape:
            raise DataError(
                f"segment_ids of shape {tuple(segment_ids.shape)}: expected that of the tokens, {tuple(tokens.shape)}"
            )
        if global_tokens is not None:
            if not any(mixer.global_tokens for mixers in self.mixers() for mixer in mixers):
                raise DataError(
                    f"this {self.architecture} takes no global_tokens: only longformer with causal=false knows such"
                )
            if not isinstance(global_tokens, Tensor):
                raise DataError(f"global_tokens is a {type(global_tokens).__name__}: expected a tensor of bool")
            if global_tokens.shape != tokens.shape or global_tokens.dtype != torch.bool:
                raise DataError(
                    f"global_tokens of shape {tuple(global_tokens.shape)} and type {global_tokens.dtype}: expected "
                    f"bool of the shape of the tokens, {tuple(tokens.shape)}"
                )
        self.check_vocabulary(tokens)

    def check_vocabulary(self, tokens: Tensor) -> None:
        """Looks at tokens on the CPU; on a GPU that would wait for the device, and an id out of range asserts there.

        Raises:
            DataError: One lies outside the vocabulary.
        """
        if tokens.device.type != "cpu" or not tokens.numel():
            return
        low, high = (int(v) for v in torch.aminmax(tokens))
        if low < 0 or high >= self.config.vocab_size:
            raise DataError(
                f"token id {low if low < 0 else high} is outside the vocabulary 0..{self.config.vocab_size - 1}: "
                f"raise vocab_size or mend the data"
            )


def _sublayers(arch: Architecture, config: ModelConfig, layer: int) -> list[Mixer]:
    """The sublayers of a block, those that read one way doubled where the model looks both ways."""
    sublayers = arch.mixer.sublayers(config, layer)
    if config.causal or all(mixer.both_ways for mixer in sublayers):
        return sublayers
    reading_back = arch.mixer.sublayers(config, layer)
    return [
        onward if onward.both_ways else Bidirectional(config, layer, onward, backward)
        for onward, backward in zip(sublayers, reading_back, strict=True)
    ]


def _positions(tokens: Tensor, state: ModelState | None, segment_ids: Tensor | None) -> Tensor:
    """Place of each token in its document, (B, T)."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    begins = torch.zeros_like(positions) if segment_ids is None else document_begins(segment_ids)
    if state is not None:  # the first document goes on
        begins = torch.where(begins == 0, -state.position[:, None], begins)
    return positions - begins


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
