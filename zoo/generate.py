"""`python -m zoo.generate model=FOLDER prompt=TEXT`: continues a text with a trained model.

Only ever run, never imported: `zoo.generate` is the function of `zoo.generation`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from zoo.checkpoint import load_pretrained, model_folder, read_description
from zoo.codec import codec_from_dict
from zoo.console import run_cli
from zoo.generation import stream
from zoo.kernels.errors import ConfigError
from zoo.settings import Settings, describe_settings, parse_overrides, setting

OWNER = "zoo generate"


@dataclass(kw_only=True)
class GenerateConfig(Settings):
    """What to generate."""

    model: str = setting(help="folder of a model, or of the run that trained it")
    prompt: str = setting("", "text to continue; empty: a line break")
    max_new_tokens: int = setting(200, "tokens to make", minimum=0)
    temperature: float = setting(0.8, "divides the logits; 0 takes the most likely token", minimum=0)
    top_k: int | None = setting(None, "draw among the k most likely tokens only", minimum=1)
    top_p: float | None = setting(None, "draw among the fewest tokens that reach this probability", above=0, maximum=1)
    seed: int = setting(0, "seed of the draws", minimum=0, maximum=2**63 - 1)
    device: str = setting("cpu", "cpu, cuda, cuda:1, ...")


def main() -> None:
    """Prints the prompt and its continuation as it is made."""
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print('usage: zoo generate model=runs/mamba-pystdlib prompt="def " [key=value ...]\n')
        for name, default, text in describe_settings(GenerateConfig):
            print(f"  {name:<16} {text}" + (f" [{default}]" if default else ""))
        return
    config = parse_overrides(GenerateConfig, arguments, OWNER)
    try:
        device = torch.device(config.device)
        torch.zeros(1, device=device).item()  # "meta" makes tensors, but they hold nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device={config.device!r} cannot be used here: pass device=cpu") from error
    tokenizer = read_description(model_folder(config.model)).get("tokenizer")
    if tokenizer is None:
        raise ConfigError(f"model={config.model} was not trained on text: generate with one that was, or from Python")
    codec = codec_from_dict(tokenizer)
    model = load_pretrained(config.model, device=device)
    prompt = config.prompt or "\n"
    tokens = torch.tensor([codec.encode(prompt)], device=device)
    new: list[int] = []
    print(prompt, end="", flush=True)
    shown = ""
    for token in stream(
        model,
        tokens,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
    ):
        new.append(int(token))
        text = codec.decode(new)
        # A character may need several tokens: what is not yet whole waits for the next one.
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(codec.decode(new)[len(shown) :])


if __name__ == "__main__":
    sys.exit(run_cli(main))
