"""Formulas for torch's FLOP counter, registered without importing it, because it loads Triton."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_COUNTER = "torch.utils.flop_counter"
_waiting: list[tuple[Any, Callable[..., int], bool]] = []


def register(op: Any, formula: Callable[..., int], *, raw: bool = False) -> None:
    """Gives the operator packet `op` a formula `(*shapes, **kwargs) -> FLOPs`, now or when the counter is imported.

    With `raw` the formula gets the tensors themselves, for FLOPs that depend on their values.
    """
    if _COUNTER in sys.modules:
        sys.modules[_COUNTER].register_flop_formula(op, get_raw=raw)(formula)
        return
    if not _waiting:
        sys.meta_path.insert(0, _AfterImport())
    _waiting.append((op, formula, raw))


class _AfterImport:
    """Import hook that waits for the FLOP counter, hands it the formulas, and removes itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                while _waiting:
                    op, formula, raw = _waiting.pop()
                    module.register_flop_formula(op, get_raw=raw)(formula)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
