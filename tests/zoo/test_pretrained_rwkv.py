"""RWKV checkpoints: those of `transformers`, and .pth files as their author writes them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import RwkvConfig, RwkvForCausalLM

import zoo
from zoo.kernels.errors import CheckpointError, ConfigError
from zoo.pretrained import convert, rwkv7
from zoo.pretrained.family import Published

from .parity import relative_error
from .published import VOCAB, assert_equal_weights, assert_same_function, logits, randomised, reopened

SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "context_length": 128, "eos_token_id": None}
CASES = {
    "plain": RwkvConfig(**SMALL, rescale_every=0),
    "odd sizes": RwkvConfig(**SMALL | {"hidden_size": 21, "intermediate_size": 50, "num_hidden_layers": 2}),
    "tied": RwkvConfig(**SMALL, tie_word_embeddings=True, rescale_every=0),
}
NAMES = {
    "rwkv.embeddings.": "emb.",
    "rwkv.ln_out.": "ln_out.",
    "rwkv.blocks.0.pre_ln.": "blocks.0.ln0.",
    "rwkv.blocks.": "blocks.",
    ".attention.": ".att.",
    ".feed_forward.": ".ffn.",
    "time_mix_key": "time_mix_k",
    "time_mix_value": "time_mix_v",
    "time_mix_receptance": "time_mix_r",
}


def as_its_author(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        for theirs, authors in NAMES.items():
            name = name.replace(theirs, authors)
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_there_and_back(config, tmp_path) -> None:
    theirs = randomised(RwkvForCausalLM(config))
    theirs.save_pretrained(tmp_path / "theirs")  # before it rescales itself in place
    ours = zoo.load_pretrained(tmp_path / "theirs")
    assert_same_function(ours, theirs)
    zoo.save_pretrained(ours, tmp_path / "back", format="transformers")
    back = reopened(RwkvForCausalLM, tmp_path / "back")
    for name, tensor in back.state_dict().items():
        # A share below a half cannot be told exactly by what is left of one.
        error = 2**-25 if "time_mix" in name else 0
        assert (tensor - theirs.state_dict()[name]).abs().max() <= error, name
    assert_same_function(ours, back)
    again = zoo.load_pretrained(tmp_path / "back")
    assert again.config == ours.config
    assert_equal_weights(again, ours)


@pytest.mark.parametrize("config", [CASES["plain"], CASES["odd sizes"]], ids=["plain", "odd sizes"])
def test_the_authors_file(config, tmp_path) -> None:
    theirs = randomised(RwkvForCausalLM(config))
    torch.save(as_its_author(theirs.state_dict()), tmp_path / "RWKV-4.pth")
    assert_same_function(zoo.load_pretrained(tmp_path / "RWKV-4.pth"), theirs)


SEVEN = {
    "plain": {"d_model": 32, "head_dim": 16},
    "odd sizes": {"d_model": 33, "head_dim": 11, "n_layers": 3, "d_ff": 50, "decay_rank": 5, "gate_rank": 7},
    "ranks": {"d_model": 16, "head_dim": 16, "value_rank": 3, "rate_rank": 9, "embedding_norm": False},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SEVEN.values(), ids=SEVEN)
def test_rwkv7(settings, dtype, tmp_path) -> None:
    model = randomised(zoo.create_model("rwkv7", vocab_size=VOCAB, **{"n_layers": 2, **settings})).to(dtype)
    table = rwkv7.table(model.config, Published({}))
    weights = {name: tensor.contiguous() for name, tensor in convert.export(model.state_dict(), table)}
    assert weights["blocks.1.att.x_r"].shape == (1, 1, model.config.d_model)
    assert weights["blocks.1.att.w1"].shape[0] == model.config.d_model
    weights |= {f"blocks.0.att.v{i}": torch.ones(3) for i in range(3)}  # in the files, and read by nobody
    torch.save(weights, tmp_path / "RWKV-x070.pth")
    loaded = zoo.load_pretrained(tmp_path / "RWKV-x070.pth")
    assert_equal_weights(loaded, model)
    tokens = torch.randint(VOCAB, (2, 20))
    assert relative_error(logits(loaded, tokens), logits(model, tokens)) == 0
    assert zoo.load_pretrained(tmp_path / "RWKV-x070.pth", dtype=torch.float32).norm.weight.dtype == torch.float32


def test_the_last_norm_has_one_epsilon(tmp_path) -> None:
    RwkvForCausalLM(RwkvConfig(**SMALL, layer_norm_epsilon=1e-3)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"layer_norm_epsilon=0.001, which the zoo's architecture does not know"):
        zoo.load_pretrained(tmp_path)
    model = zoo.create_model("rwkv4", vocab_size=VOCAB, d_model=16, norm_eps=1e-3)
    with pytest.raises(ConfigError, match=r"norm_eps=0.001 has no word in the rwkv of transformers"):
        zoo.save_pretrained(model, tmp_path / "never", format="transformers")


@pytest.mark.parametrize(
    ("generation", "names"),
    [
        ("RWKV-5", ["time_faaaa", "time_mix_k", "ln_x.weight"]),
        ("RWKV-5", ["time_first", "time_mix_k", "ln_x.weight"]),
        ("RWKV-6", ["time_faaaa", "time_maa_x", "ln_x.weight"]),
    ],
)
def test_other_generations_are_not_mistaken(generation, names, tmp_path) -> None:
    weights = {"emb.weight": torch.ones(3, 4), "blocks.0.ffn.time_mix_r": torch.ones(1, 1, 4)}
    weights |= {f"blocks.0.att.{name}": torch.ones(1, 1, 4) for name in names}
    torch.save(weights, tmp_path / "RWKV.pth")
    with pytest.raises(CheckpointError, match=f"is {generation} by the names of its tensors: the zoo loads RWKV-4 and"):
        zoo.load_pretrained(tmp_path / "RWKV.pth")
    torch.save({"emb.weight": torch.ones(3, 4)}, tmp_path / "RWKV.pth")
    with pytest.raises(CheckpointError, match=r"none of rwkv4 \(.pth\), rwkv7 \(.pth\)"):
        zoo.load_pretrained(tmp_path / "RWKV.pth")


def test_without_the_norm_after_the_embedding(tmp_path) -> None:
    """A .pth file may lack it, and then the model has none; transformers' own always has it."""
    model = randomised(zoo.create_model("rwkv4", vocab_size=VOCAB, d_model=16))
    zoo.save_pretrained(model, tmp_path, format="transformers")
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "pre_ln" not in name}
    assert len(kept) == len(weights) - 2
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing \['rwkv.blocks.0.pre_ln.bias', 'rwkv.blocks"):
        zoo.load_pretrained(tmp_path)
    torch.save(as_its_author(kept), tmp_path / "RWKV-4.pth")
    assert not zoo.load_pretrained(tmp_path / "RWKV-4.pth").config.embedding_norm


def test_rwkv7_is_not_in_transformers(tmp_path) -> None:
    model = zoo.create_model("rwkv7", vocab_size=VOCAB, d_model=16)
    with pytest.raises(ConfigError, match="transformers has no rwkv7 like ours"):
        zoo.save_pretrained(model, tmp_path / "never", format="transformers")
    assert not (tmp_path / "never").exists()
