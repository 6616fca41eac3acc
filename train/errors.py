"""Errors of a run that its settings alone do not explain; the command line exits with status 1 for them."""

from __future__ import annotations

from pathlib import Path

from zoo.kernels.errors import ZooError


class RunError(ZooError):
    """A run could not go on."""

    exit_status = 1


class NonFiniteError(RunError):
    """A loss or gradient became infinite or NaN; the update that it would have caused was not applied."""

    def __init__(self, step: int, what: str, layer: str, hint: str = "") -> None:
        self.step, self.what, self.layer = step, what, layer
        super().__init__(f"step {step}: {what} is not finite, first seen in {layer}{hint}")

    def with_hint(self, kept: str) -> NonFiniteError:
        """The same error, with what was kept and the mend."""
        return NonFiniteError(self.step, self.what, self.layer, f"; {kept}: lower optim.lr or look at the data")


class Interrupted(KeyboardInterrupt):
    """A run was ended by a signal, with everything written that resume=true needs."""

    def __init__(self, step: int, folder: Path) -> None:
        super().__init__(f"interrupted after step {step}: the same command with resume=true goes on in {folder}")
