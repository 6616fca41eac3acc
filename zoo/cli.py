"""The door: `zoo VERB ...` runs the module of that verb, as `python -m zoo.VERB ...` does."""

from __future__ import annotations

import runpy
import sys

from zoo._version import __version__
from zoo.console import run_cli
from zoo.kernels.errors import ConfigError, did_you_mean

VERBS = {
    "train": ("zoo.train", "train an architecture: zoo train arch=mamba data=mqar"),
    "list": ("zoo.list", "table of the registered architectures"),
    "compare": ("zoo.compare", "train and measure architectures head to head: zoo compare arch=mamba,transformer"),
    "eval": ("zoo.eval", "how well a trained model does on a task: zoo eval model=runs/mamba-mqar data=mqar"),
    "generate": ("zoo.generate", "continue a text with a trained model: zoo generate model=runs/mamba-pystdlib"),
    "score": ("zoo.score", "how well a trained model predicts a text: zoo score model=runs/mamba-pystdlib text=a.py"),
    "masks": ("zoo.masks", "draw what attention sees: zoo masks arch=longformer window=8 out=mask.png"),
    "bench": ("zoo.bench", "time, memory and FLOPs against length: zoo bench arch=mamba,transformer"),
    "kernels": ("zoo.kernels", "operators, their backends, and which would run on this machine"),
}

HELP = (
    f"""zoo {__version__}: a model zoo of sub-quadratic sequence architectures

usage: zoo VERB [key=value ...]      (the same as python -m zoo VERB ...)

verbs:
"""
    + "\n".join(f"  {verb:<10} {text}" for verb, (_, text) in VERBS.items())
    + """

`zoo VERB --help` says more. ZOO_DEBUG=1 shows tracebacks."""
)


def main() -> None:
    """Runs one verb; the rest of the command line is its own."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return
    if arguments[0] == "--version":
        print(__version__)
        return
    sys.exit(run_cli(lambda: _dispatch(arguments[0], arguments[1:])))


def _dispatch(verb: str, rest: list[str]) -> None:
    if verb not in VERBS:
        raise ConfigError(f"no verb {verb!r}: {did_you_mean(verb, VERBS)}")
    sys.argv = [f"zoo {verb}", *rest]
    # Run, not imported: the verbs live above this package, and imports go down only.
    runpy.run_module(VERBS[verb][0], run_name="__main__", alter_sys=False)
