"""`python -m zoo.generate model=FOLDER prompt=TEXT`: continues a text with a trained model.

Only ever run, never imported: `zoo.generate` is the function of `zoo.generation`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import torch

from zoo.command import ModelSettings, load_model, parse_command, print_help
from zoo.console import run_cli
from zoo.generation import stream
from zoo.kernels.errors import ConfigError
from zoo.settings import setting

OWNER = "zoo generate"


@dataclass(kw_only=True)
class GenerateConfig(ModelSettings):
    """What to generate."""

    prompt: str | None = setting(None, "text to continue; null: a line break")
    max_new_tokens: int = setting(200, "tokens to make", minimum=0)
    temperature: float = setting(0.8, "divides the logits; 0 takes the most likely token", minimum=0)
    top_k: int | None = setting(None, "draw among the k most likely tokens only", minimum=1)
    top_p: float | None = setting(None, "draw among the fewest tokens that reach this probability", above=0, maximum=1)
    stop: str = setting("", 'end before this text; several as a list: stop=\'["\\n\\n", "def "]\'')
    prefill_chunk: int = setting(4096, "tokens of the prompt that are read at once", minimum=1)
    seed: int = setting(0, "seed of the draws", minimum=0, maximum=2**63 - 1)

    def stop_texts(self) -> list[str]:
        """The texts of `stop`."""
        try:
            texts = json.loads(self.stop)
        except json.JSONDecodeError:
            texts = None
        if not isinstance(texts, list):
            return [self.stop] if self.stop else []
        if not all(isinstance(text, str) and text for text in texts):
            self.fail("stop", "expected a text, or a list of texts that are not empty")
        return texts


def main() -> None:
    """Prints the prompt and its continuation as it is made."""
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print_help(GenerateConfig, 'zoo generate model=runs/mamba-pystdlib prompt="def "')
        return
    config, policies = parse_command(GenerateConfig, arguments, OWNER)
    stops = config.stop_texts()
    prompt = "\n" if config.prompt is None else config.prompt
    if not prompt:
        raise ConfigError("prompt= is empty: give a text to continue, or leave prompt out to begin with a line break")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"prompt= is no UTF-8 at character {error.start}: save it as UTF-8, or leave that out"
        ) from None
    model, codec = load_model(config, policies)
    if codec is None:
        raise ConfigError(f"model={config.model} was not trained on text: generate with one that was, or from Python")
    made = stream(
        model,
        torch.tensor([codec.encode(prompt)]),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        prefill_chunk=config.prefill_chunk,
    )
    print(prompt, end="", flush=True)
    new: list[int] = []
    text, shown = "", 0
    for token in made:
        new.append(int(token))
        text = codec.decode(new)
        found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
        if found:
            text = text[: min(found)]
            break
        # A character may need several tokens, and what may begin a stop text is not yet known to be shown.
        if not text.endswith("\ufffd"):
            certain = len(text) - max((_begun(text, stop) for stop in stops), default=0)
            print(text[shown:certain], end="", flush=True)
            shown = max(shown, certain)
    print(text[shown:])


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop text."""
    return next((size for size in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:size])), 0)


if __name__ == "__main__":
    sys.exit(run_cli(main))
