"""`data=pystdlib`: sources of the running Python's standard library, as bytes. Real text on every machine, offline."""

from __future__ import annotations

import os
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.codec import ByteCodec
from zoo.kernels.errors import DataError
from zoo.settings import setting
from zoo.train.data.base import register_data
from zoo.train.data.corpus import FileCorpus, Shares, files_corpus
from zoo.train.data.text import PackedText, PackedTextConfig

# Not the library itself (installed packages, tests, demos), or tables rather than text: the character maps of
# `encodings`, and `pydoc_data`, one generated file that would be most of a split. `config-*` depends on the machine.
_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "turtledemo",
    "encodings",
    "pydoc_data",
    "__pycache__",
}
_MACHINE_DEPENDENT = ("_sysconfigdata", "sitecustomize", "usercustomize")


@dataclass(kw_only=True)
class PyStdlibConfig(PackedTextConfig):
    """Settings of `data=pystdlib`: those of every packed text."""

    validation_examples: int | None = setting(
        256, "validation windows to keep, spread over the split; null: all", minimum=1
    )


@register_data("pystdlib", config=PyStdlibConfig)
class PyStdlib(PackedText[PyStdlibConfig]):
    """The standard library's `.py` files, split by file: 90 % training, 5 % validation, 5 % test.

    Validation takes 256 windows spread over its files by default, so that it stays short beside training on a CPU; the
    test split is read whole.

    Args:
        config: its settings.

    Raises:
        DataError: this Python came without sources.
    """

    def __init__(self, config: PyStdlibConfig) -> None:
        super().__init__(config, stdlib_corpus(Path(sysconfig.get_path("stdlib"))), ByteCodec())

    def facts(self) -> dict[str, Any]:
        """The corpus, and the Python version it is from."""
        return super().facts() | {"python": platform.python_version()}


def stdlib_corpus(root: Path) -> FileCorpus:
    """The corpus of the `.py` files in a standard library's folder.

    Raises:
        DataError: there are none, as in Pythons that keep their library in a zip file.
    """
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT and not name.startswith("config-")]
        files += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(_MACHINE_DEPENDENT)
        ]
    if not files:
        raise DataError(
            f"data=pystdlib: this Python has no .py sources in {root}; use data=text data.path=<your files>"
        )
    return files_corpus("data=pystdlib", root, files, Shares())
