"""Checkpoints at random, made by `transformers`, and what the tests of loading and saving compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zoo

from .parity import relative_error

TOLERANCE = 1e-4
VOCAB = 61


def randomised(model: nn.Module, seed: int = 1) -> nn.Module:
    """With parameters that all matter, tied ones once."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "time_mix" in name:
                parameter.copy_(noise.sigmoid())
            elif parameter.ndim >= 2 and "A_log" not in name:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


def logits(model: nn.Module, tokens: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, **more).logits


def assert_same_function(ours: zoo.Model, theirs: nn.Module, time: int = 40, generate: bool = True) -> None:
    """Equal logits, and the same 50 tokens after a prompt."""
    tokens = torch.randint(3, VOCAB, (2, time), generator=torch.Generator().manual_seed(3))
    assert relative_error(logits(ours, tokens), logits(theirs, tokens)) < TOLERANCE
    if generate:
        prompt = tokens[:1, :7]
        expected = theirs.generate(prompt, max_new_tokens=50, min_new_tokens=50, do_sample=False, pad_token_id=0)
        made = zoo.generate(ours, prompt, max_new_tokens=50, temperature=0)
        assert torch.equal(made[0, -50:], expected[0, -50:])


def assert_equal_weights(one: nn.Module, other: nn.Module) -> None:
    expected = other.state_dict()
    assert one.state_dict().keys() == expected.keys()
    for name, tensor in one.state_dict().items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def reopened(kind: Any, folder: Path) -> nn.Module:
    """A folder as `transformers` opens it, which must find all it looks for and nothing else."""
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()
