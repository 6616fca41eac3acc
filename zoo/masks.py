"""`python -m zoo.masks arch=longformer window=8 out=mask.png`: draws which keys each query sees.

The pictures are of what runs: each attention layer is built as the settings say, and asked (`zoo.sight`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zoo.console import run_cli
from zoo.kernels import backends
from zoo.kernels.errors import ConfigError, ZooError
from zoo.layers.attention import Attention
from zoo.registry import architecture, list_models
from zoo.settings import Settings, describe_settings, parse_overrides, setting
from zoo.sight import Sight, attention_of, look

OWNER = "zoo masks"
FORMATS = (".png", ".svg", ".pdf")
LONGEST = 512
"""Tokens; longer, a pair is no longer a pixel of its own."""


@dataclass(kw_only=True)
class MasksConfig(Settings):
    """What to draw; all other words are settings of the architecture."""

    arch: str = setting(help="an architecture with attention")
    layer: int | str | None = setting(None, "number of a layer, or all; null: the first that attends")
    length: int | None = setting(
        None, "tokens of the sequence; null: 64, or the sum of documents", minimum=1, maximum=LONGEST
    )
    documents: list[int] | None = setting(None, "lengths of packed documents, as in 20,44; null: one document")
    training: bool = setting(False, "as in training, where that differs (bigbird plan=transformers)")
    out: str = setting("mask.png", f"the file to write: {', '.join(FORMATS)}")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layer, str) and self.layer != "all":
            self.fail("layer", "expected a number, or all")
        if Path(self.out).suffix not in FORMATS:
            self.fail("out", f"expected a name that ends in {' or '.join(FORMATS)}")
        if not Path(self.out).absolute().parent.is_dir():
            self.fail("out", "expected a folder that exists: make it first")
        if self.documents is not None:
            total = sum(self.documents)
            if not self.documents or min(self.documents) < 1 or total > LONGEST:
                self.fail("documents", f"expected lengths of at least 1, at most {LONGEST} in all")
            if self.length not in (None, total):
                self.fail("documents", f"expected lengths that add up to length={self.length}")
            self.length = total
        self.length = self.length or 64


def sights(settings: MasksConfig, words: Sequence[str]) -> list[Sight]:
    """What the layers see that the command line names; `words` are settings of the architecture."""
    arch = architecture(settings.arch)
    config = parse_overrides(arch.config, [*_irrelevant(words), *words], f"architecture {arch.name!r}")
    length = settings.length or 0
    if config.max_positions is not None and length > config.max_positions:
        settings.fail("length", f"expected at most max_positions={config.max_positions}")
    if isinstance(settings.layer, int) and not 0 <= settings.layer < config.n_layers:
        settings.fail("layer", f"expected 0 to n_layers - 1 = {config.n_layers - 1}, or all")
    attending = [i for i in range(config.n_layers) if attention_of(arch, config, i) is not None]
    if not attending or arch.mixer.make_wrapper(config) is not None:
        raise ConfigError(f"{arch.name} has no mask over its tokens: draw one of {', '.join(_masked())}")
    chosen = attending if settings.layer == "all" else [attending[0] if settings.layer is None else settings.layer]
    found = []
    for layer in chosen:
        sight = look(arch, config, int(layer), length, settings.documents, training=settings.training)
        if sight is None:
            settings.fail("layer", f"expected one that attends: {', '.join(map(str, attending))}, or all")
        found.append(sight)
    return found


def _masked() -> list[str]:
    """Architectures whose layers attend to the tokens themselves, and not to others that were inserted."""
    found = (architecture(name) for name in list_models())
    return [
        arch.name
        for arch in found
        if issubclass(arch.mixer, Attention) and arch.mixer.make_wrapper(arch.config(vocab_size=1)) is None
    ]


def _irrelevant(words: Sequence[str]) -> list[str]:
    """Settings that change no mask, such that they suit the others."""
    heads = [text for key, _, text in (word.partition("=") for word in words) if key == "n_heads"]
    return ["vocab_size=1", *(f"d_model={2 * max(1, int(text))}" for text in heads if text.isdecimal())]


def main() -> None:
    """Writes the picture."""
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print("usage: zoo masks arch=longformer [key=value ...] [settings of the architecture, as in window=8]\n")
        for name, default, text in describe_settings(MasksConfig):
            print(f"  {name:<10} {text}" + (f" [{default}]" if default else ""))
        return
    own = [word for word in arguments if word.partition("=")[0] in MasksConfig.__dataclass_fields__]
    settings = parse_overrides(MasksConfig, own, OWNER)
    words = [word.removeprefix("arch.") for word in arguments if word not in own]
    found = sights(settings, words)
    missing = backends.missing("matplotlib", "'subquadratic-zoo[plots]'")
    if missing:
        raise ZooError(f"no picture is drawn: {missing}")
    from zoo.mask_figure import draw

    told = ("arch", "layer", "length", "out")  # elsewhere in the picture
    subject = " ".join(word for word in arguments if word.partition("=")[0] not in told)
    draw(found, settings.arch, subject, settings.documents, Path(settings.out))
    print(f"wrote {settings.out}")


if __name__ == "__main__":
    sys.exit(run_cli(main))
