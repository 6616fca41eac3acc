"""The table of public variants: each size is what the published settings make of the architecture."""

from __future__ import annotations

import pytest

from zoo.checkpoint import _build
from zoo.pretrained.families import by_settings
from zoo.pretrained.family import Published
from zoo.pretrained.variants import variants


def llama(width, layers, heads, kv_heads, hidden, vocab, tied=False, kind="llama") -> dict:
    """What config.json says, by the names there."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": kv_heads, "intermediate_size": hidden, "vocab_size": vocab}
    return {"model_type": kind, "tie_word_embeddings": tied, **sizes}


def mamba(width, layers) -> dict:
    return {"model_type": "mamba", "hidden_size": width, "num_hidden_layers": layers, "vocab_size": 50280}


def mamba2(width, layers) -> dict:
    cfg = {"ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16, "tie_embeddings": True}
    return {"d_model": width, "n_layer": layers, "vocab_size": 50277, "rms_norm": True, **cfg}


def rwkv4(width, layers) -> dict:
    return {"model_type": "rwkv", "hidden_size": width, "num_hidden_layers": layers, "vocab_size": 50277}


def encoder(kind, width, layers, heads, vocab, **more) -> dict:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocab}
    return {"model_type": kind, "intermediate_size": 4 * width, **sizes, **more}


def longformer(width, layers, heads) -> dict:
    more = {"max_position_embeddings": 4098, "attention_window": [512] * layers, "pad_token_id": 1}
    return encoder("longformer", width, layers, heads, 50265, type_vocab_size=1, **more)


def bigbird(width, layers, heads) -> dict:
    return encoder("big_bird", width, layers, heads, 50358, max_position_embeddings=4096, type_vocab_size=2)


PUBLISHED = {
    "mamba-130m": mamba(768, 24),
    "mamba-370m": mamba(1024, 48),
    "mamba-790m": mamba(1536, 48),
    "mamba-1.4b": mamba(2048, 48),
    "mamba-2.8b": mamba(2560, 64),
    "mamba2-130m": mamba2(768, 24),
    "mamba2-370m": mamba2(1024, 48),
    "mamba2-780m": mamba2(1536, 48),
    "mamba2-1.3b": mamba2(2048, 48),
    "mamba2-2.7b": mamba2(2560, 64),
    "rwkv-4-169m-pile": rwkv4(768, 12),
    "rwkv-4-430m-pile": rwkv4(1024, 24),
    "rwkv-4-1b5-pile": rwkv4(2048, 24),
    "rwkv-4-3b-pile": rwkv4(2560, 32),
    "rwkv-4-7b-pile": rwkv4(4096, 32),
    "rwkv-4-14b-pile": rwkv4(5120, 40),
    "smollm2-135m": llama(576, 30, 9, 3, 1536, 49152, tied=True),
    "smollm2-360m": llama(960, 32, 15, 5, 2560, 49152, tied=True),
    "smollm2-1.7b": llama(2048, 24, 32, 32, 8192, 49152, tied=True),
    "tinyllama-1.1b-chat": llama(2048, 22, 32, 4, 5632, 32000),
    "llama-2-7b": llama(4096, 32, 32, 32, 11008, 32000),
    "llama-3-8b": llama(4096, 32, 32, 8, 14336, 128256),
    "llama-3.1-8b": llama(4096, 32, 32, 8, 14336, 128256),
    "llama-3.2-1b": llama(2048, 16, 32, 8, 8192, 128256, tied=True),
    "llama-3.2-3b": llama(3072, 28, 24, 8, 8192, 128256, tied=True),
    "code-llama-7b": llama(4096, 32, 32, 32, 11008, 32016),
    "mistral-7b": llama(4096, 32, 32, 8, 14336, 32000, kind="mistral"),
    "yi-6b": llama(4096, 32, 32, 4, 11008, 64000),
    "qwen2-0.5b": llama(896, 24, 14, 2, 4864, 151936, tied=True, kind="qwen2"),
    "qwen2.5-0.5b": llama(896, 24, 14, 2, 4864, 151936, tied=True, kind="qwen2"),
    "qwen2.5-1.5b": llama(1536, 28, 12, 2, 8960, 151936, tied=True, kind="qwen2"),
    "longformer-base": longformer(768, 12, 12),
    "longformer-large": longformer(1024, 24, 16),
    "bigbird-base": bigbird(768, 12, 12),
    "bigbird-large": bigbird(1024, 24, 16),
}
RWKV7 = {  # width, blocks, ranks of decay, rate, value and gate, which their files alone tell
    "rwkv-7-world-0.1b": (768, 12, 64, 64, 32, 128),
    "rwkv-7-world-0.4b": (1024, 24, 64, 64, 32, 128),
    "rwkv-7-world-1.5b": (2048, 24, 96, 96, 64, 256),
    "rwkv-7-world-2.9b": (2560, 32, 96, 96, 64, 320),
}


def ours(name: str) -> tuple[str, dict]:
    if name in RWKV7:
        keys = ("d_model", "n_layers", "decay_rank", "rate_rank", "value_rank", "gate_rank")
        return "rwkv7", {"vocab_size": 65536, **dict(zip(keys, RWKV7[name], strict=True))}
    family = by_settings(PUBLISHED[name], name)
    return family.architecture, family.read(Published(PUBLISHED[name], name))


PUBLIC = [name for name, row in variants().items() if row.hub_id is not None]


@pytest.mark.parametrize("name", PUBLIC)
def test_size(name) -> None:
    architecture, settings = ours(name)
    model = _build(architecture, settings, name)  # without memory, as loading does
    row = variants()[name]
    assert row.family == architecture
    assert row.parameters == sum(parameter.numel() for parameter in model.parameters())
