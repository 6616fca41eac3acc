"""Longformer and BigBird checkpoints, both ways."""

from __future__ import annotations

import pytest
import torch
from transformers import BigBirdConfig, BigBirdForMaskedLM, LongformerConfig, LongformerForMaskedLM

import zoo
from zoo.kernels.errors import ConfigError
from zoo.layers.attention import BERT

from .parity import relative_error
from .published import TOLERANCE, VOCAB, assert_equal_weights, assert_same_function, logits, randomised, reopened

SMALL = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
SMALL |= {"intermediate_size": 28, "sep_token_id": 2}
LONG = SMALL | {"max_position_embeddings": 130, "pad_token_id": 1}
LONGFORMERS = {
    "plain": LongformerConfig(**LONG, attention_window=8, type_vocab_size=1),
    "windows, two types": LongformerConfig(**LONG, attention_window=[6, 12], type_vocab_size=2, layer_norm_eps=1e-5),
    "untied": LongformerConfig(**LONG, attention_window=16, tie_word_embeddings=False),
}
BIG = SMALL | {"max_position_embeddings": 160, "pad_token_id": 0, "block_size": 4}
BIGBIRDS = {
    "plain": BigBirdConfig(**BIG, num_random_blocks=2),
    "gelu, one type": BigBirdConfig(**BIG, num_random_blocks=1, hidden_act="gelu", type_vocab_size=1),
    "untied": BigBirdConfig(**BIG | {"block_size": 8}, num_random_blocks=1, tie_word_embeddings=False),
}
CASES = [(LongformerForMaskedLM, config) for config in LONGFORMERS.values()]
CASES += [(BigBirdForMaskedLM, config) for config in BIGBIRDS.values()]


@pytest.mark.parametrize(("kind", "config"), CASES, ids=[*LONGFORMERS, *BIGBIRDS])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_there_and_back(kind, config, tmp_path) -> None:
    theirs = randomised(kind(config))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = zoo.load_pretrained(tmp_path / "theirs")
    assert_same_function(ours, theirs, time=100, generate=False)
    zoo.save_pretrained(ours, tmp_path / "back", format="transformers")
    back = reopened(kind, tmp_path / "back")
    assert_same_function(ours, back, time=100, generate=False)
    # Type 0 is part of our positions, and what has no effect is not kept.
    silent = ["position_embeddings", "token_type", "pooler", "key_global.bias"]
    silent += [] if config.tie_word_embeddings else ["lm_head.bias", "cls.predictions.bias"]
    for name, tensor in back.state_dict().items():
        if not any(part in name for part in silent):
            assert torch.equal(tensor, theirs.state_dict()[name]), name
    again = zoo.load_pretrained(tmp_path / "back")
    assert again.config.max_positions == ours.config.max_positions
    assert_equal_weights(again, ours)


def test_global_tokens(tmp_path) -> None:
    theirs = randomised(LongformerForMaskedLM(LONGFORMERS["plain"]))
    theirs.save_pretrained(tmp_path)
    ours = zoo.load_pretrained(tmp_path)
    tokens, marks = torch.randint(3, VOCAB, (2, 50)), torch.zeros(2, 50, dtype=torch.bool)
    marks[:, [0, 20]] = True
    expected = logits(theirs, tokens, global_attention_mask=marks.long())
    assert relative_error(logits(ours, tokens, global_tokens=marks), expected) < TOLERANCE


@pytest.mark.parametrize("name", ["longformer", "bigbird"])
def test_made_here_opens_there(name, tmp_path) -> None:
    own = {
        "longformer": {"windows": [3, 5], "n_global": 2, "max_positions": 128},
        "bigbird": {"block_size": 4, "n_random_blocks": 1, "max_positions": 128, "plan": "transformers"},
    }[name]
    ours = randomised(zoo.create_model(name, vocab_size=VOCAB, d_model=24, n_heads=2, **{**BERT, **own}))
    zoo.save_pretrained(ours, tmp_path, format="transformers")
    theirs = reopened({"longformer": LongformerForMaskedLM, "bigbird": BigBirdForMaskedLM}[name], tmp_path)
    tokens = torch.randint(3, VOCAB, (2, 60))
    more = {}
    if name == "longformer":
        more["global_attention_mask"] = (torch.arange(60) < 2).long().expand(2, -1)
    assert relative_error(logits(ours, tokens), logits(theirs, tokens, **more)) < TOLERANCE
    again = zoo.load_pretrained(tmp_path)
    assert_equal_weights(again, ours)
    assert torch.equal(logits(again, tokens), logits(ours, tokens))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("longformer", {"dilation": 2}, "dilation=2 has no word"),
        ("longformer", {"causal": True, "mlm_head": None}, "causal=True has no word"),
        ("bigbird", {}, "plan='hash' has no word"),
    ],
)
def test_what_has_no_word_is_refused(name, settings, message, tmp_path) -> None:
    model = zoo.create_model(name, vocab_size=VOCAB, d_model=24, n_heads=2, **{**BERT, "max_positions": 64, **settings})
    with pytest.raises(ConfigError, match=message):
        zoo.save_pretrained(model, tmp_path / "never", format="transformers")
    assert not (tmp_path / "never").exists()
